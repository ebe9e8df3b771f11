"""Text to calibrate and measure on: the documentation inside CPython, or a file of the user's."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

MAX_BYTES = 64 * 2**20
"""Largest text file that is read."""

HELDOUT_SHARE = 0.4
"""Fraction of the built-in text, by characters, that is held out."""

SHORT = 60
"""Paragraphs of fewer characters (headings, one-line examples) may recur without being copies."""


@lru_cache(maxsize=1)
def builtin_text() -> str:
    """The English documentation in CPython's `pydoc_data.topics`, topics in alphabetical order: over 100,000 tokens."""
    return "\n\n".join(_topics().values())


def calibration_text() -> str:
    """The part of the built-in text to tune on. Shares no paragraph with `heldout_text`, and repeats none."""
    return _split()[0]


def heldout_text() -> str:
    """The part of the built-in text to measure on. Shares no paragraph with `calibration_text`, and repeats none."""
    return _split()[1]


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file.

    Args:
        path: A UTF-8 text file.

    Returns:
        The text, with Unix line ends.

    Raises:
        ValueError: If it cannot be read, is larger than 64 MiB, is not UTF-8, or holds no text.
    """
    name = str(path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"text={name!r}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"text={name!r}: more than {MAX_BYTES // 2**20} MiB, expected a smaller file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text={name!r}: byte {error.start} is not UTF-8, expected a UTF-8 text file") from error
    if "\0" in text or not text.strip():
        raise ValueError(f"text={name!r}: {'holds NUL bytes' if text.strip() else 'is empty'}, expected plain text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_text(text: str, heldout: float = HELDOUT_SHARE) -> tuple[str, str]:
    """Cut a text into `(calibration, heldout)` at the paragraph (or else line) end nearest the wanted share.

    Args:
        text: The text.
        heldout: Fraction of the characters, at the end, to hold out; in (0, 1).

    Returns:
        The two parts.

    Raises:
        ValueError: If `heldout` is out of range or the text has no line to cut at.
    """
    if not 0 < heldout < 1:
        raise ValueError(f"heldout={heldout}: expected a fraction between 0 and 1")
    wanted = int(len(text) * (1 - heldout))
    for mark in ("\n\n", "\n", ". ", " "):
        before, after = text.rfind(mark, 0, wanted), text.find(mark, wanted)
        places = [place + len(mark) for place in (before, after) if place >= 0]
        if places:
            cut = min(places, key=lambda place: abs(place - wanted))
            if text[:cut].strip() and text[cut:].strip():
                return text[:cut].strip(), text[cut:].strip()
    raise ValueError(f"text of {len(text)} characters: expected at least two words, to hold some out")


@lru_cache(maxsize=1)
def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return {name: _clean(topics[name]) for name in sorted(topics)}


def _clean(text: str) -> str:
    """Unix line ends, no trailing blanks, no underlines of headings, at most one empty line in a row."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    kept = [line for line in lines if not (len(line) > 3 and len(set(line)) == 1 and line[0] in "*=-~^")]
    paragraphs = "\n".join(kept).split("\n\n")
    return "\n\n".join(paragraph.strip("\n") for paragraph in paragraphs if paragraph.strip())


@lru_cache(maxsize=1)
def _split() -> tuple[str, str]:
    """Topics that share a paragraph stay on one side; the sides then fill up with such groups in turn."""
    parts: tuple[list[str], list[str]] = ([], [])
    sizes = [0.0, 0.0]
    for names in _related_topics():
        seen: set[str] = set()
        paragraphs = []
        for paragraph in (p for name in names for p in _topics()[name].split("\n\n")):
            if len(paragraph) < SHORT or paragraph not in seen:
                paragraphs.append(paragraph)
            seen.add(paragraph)
        text = "\n\n".join(paragraphs)
        side = int(sizes[1] / HELDOUT_SHARE <= sizes[0] / (1 - HELDOUT_SHARE))
        parts[side].append(text)
        sizes[side] += len(text)
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def _related_topics() -> list[list[str]]:
    """Groups of topics connected by a common paragraph, largest group first."""
    groups: dict[str, list[str]] = {}
    home: dict[str, str] = {}
    leader: dict[str, str] = {}
    for name, text in _topics().items():
        groups[name], leader[name] = [name], name
        for paragraph in text.split("\n\n"):
            if len(paragraph) < SHORT:
                continue
            other = leader[home.setdefault(paragraph, name)]
            if other != leader[name]:
                moved = groups.pop(leader[name])
                groups[other] += moved
                leader.update(dict.fromkeys(moved, other))
    size = {key: sum(len(_topics()[name]) for name in names) for key, names in groups.items()}
    return sorted((sorted(names) for names in groups.values()), key=lambda names: (-size[leader[names[0]]], names))
