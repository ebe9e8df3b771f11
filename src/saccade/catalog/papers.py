"""The 380 papers: one row each, shipped as package data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Paper:
    """One row of the catalogue.

    Args:
        title: Exact title.
        name: What the mechanism is called.
        scope: "mechanism", "system" or "context" (nothing to build).
        room: Folder it would live in.
        what: How it works.
        claims: What its authors measured.
        unit: What there is to build.
        repo: The authors' repository, or "".
        library: A library that has it, or "".
        missing: What of it is not built, or was not public when it was built; "" if there is nothing to say.
    """

    title: str
    name: str
    scope: str
    room: str
    what: str
    claims: str
    unit: str
    repo: str
    library: str
    missing: str = ""


@cache
def papers() -> tuple[Paper, ...]:
    """All rows, in catalogue order."""
    text = files("saccade.catalog").joinpath("papers.jsonl").read_text(encoding="utf-8")
    return tuple(Paper(**json.loads(line)) for line in text.splitlines())


@cache
def paper_titles() -> frozenset[str]:
    """All titles."""
    return frozenset(paper.title for paper in papers())
