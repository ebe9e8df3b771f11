"""`saccade bench cache`: what every cache policy costs in quality, for what it saves in bytes and time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from saccade.bench.cache_prompt import Prompt, read_prompt
from saccade.bench.cache_quality import PROTOCOLS, Material, caches_of, make_material, recall_quality, text_quality
from saccade.bench.cache_rows import BUDGETS, Candidate, candidates, composed, matching
from saccade.bench.measure import interleaved, median
from saccade.mechanisms.cache.base import CachePolicy
from saccade.models.ruler import TASKS

PARTS = ("text", *PROTOCOLS, "speed")
"""What is measured of every row."""

TOGETHER = 8
"""Rows whose caches are in memory at once while their speeds are measured, in turn with dense."""

COLUMNS = (
    "cache", "settings", "budget", "held", "read", "tokens/s", "perplexity",
    *(column for protocol in PROTOCOLS for column in (f"{protocol}: {', '.join(TASKS)}", f"{protocol}: nats")),
)  # fmt: skip


@dataclass(frozen=True)
class CacheRow:
    """A policy at a budget, or dense attention.

    Args:
        name: Registry name, what is composed, or "dense": transformers' own cache and attention.
        settings: `name=value`, with commas between.
        budget: What was asked for; None for dense and for forms of storage.
        effects: What it sets out to save.
        measured: By part of `PARTS`, as far as measured: see `text_quality`, `recall_quality` and `_speeds`.
        ratio: Its perplexity over that of dense, where both are known.
        nats: By protocol, log-probability of the answers, mean over the tasks, less that with dense.
    """

    name: str
    settings: str
    budget: float | None
    effects: tuple[str, ...]
    measured: dict[str, dict[str, Any]]
    ratio: float | None
    nats: dict[str, float]

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of `COLUMNS`; empty where nothing was measured."""
        text, speed = self.measured.get("text"), self.measured.get("speed")
        recall: list[str] = []
        for protocol in PROTOCOLS:
            found = self.measured.get(protocol, {}).get("found", {})
            recall.append(", ".join(f"{part:.0%}" for part in found.values()))
            recall.append(f"{self.nats[protocol]:+.2f}" if protocol in self.nats else "")
        rise = "" if self.ratio is None else f" ({self.ratio - 1:+.1%})"
        return (
            self.name, self.settings, "" if self.budget is None else f"{self.budget:.0%}",
            *(("", "") if text is None else (f"{text['held']:.0%}", f"{text['read']:.0%}")),
            "" if speed is None else f"{speed['tokens_per_second']:.1f} ({speed['speedup']:.2f}x)",
            "" if text is None else f"{text['perplexity']:.2f}{rise}",
            *recall,
        )  # fmt: skip


@dataclass(frozen=True)
class CacheBench:
    """What `bench_cache` measured.

    Args:
        about: Context, steps, windows, tries and dtype.
        table: Dense first, then by policy and falling budget, then what is composed.
        left_out: Policies and budgets that are not in the table, and why.
    """

    about: dict[str, Any]
    table: tuple[CacheRow, ...]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of the table."""
        return [row.cells() for row in self.table]


@dataclass
class Notes:
    """What has been measured, on file line by line, so that a run that was cut off goes on where it stopped.

    Args:
        about: What was measured on; lines about something else are passed over.
        path: JSON lines, read and appended to; None for memory only.
    """

    about: dict[str, Any]
    path: Path | None = None
    found: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                note = json.loads(line)
                if note["about"] == self.about:
                    self.found[note["name"], note["settings"], note["part"]] = note["measured"]

    def add(self, name: str, settings: str, part: str, measured: dict[str, Any]) -> None:
        """Remember, and write down."""
        self.found[name, settings, part] = measured
        if self.path is not None:
            note = {"about": self.about, "name": name, "settings": settings, "part": part, "measured": measured}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(note) + "\n")


def bench_cache(
    model: Any, tokenizer: Any, context: int = 2048, *, steps: int = 48, windows: int = 4, tries: int = 3,
    rounds: int = 12, budgets: Sequence[float] = BUDGETS, only: str | None = None,
    parts: Sequence[str] = PARTS, notes: Path | None = None, progress: Callable[[str], object] = str,
) -> CacheBench:  # fmt: skip
    """Run a model with every registered cache policy at some budgets, dense beside it, on the same prompts.

    Args:
        model: A transformers causal language model in eval mode, without a recipe.
        tokenizer: Its tokenizer.
        context: Tokens of a window or prompt, question and answer included.
        steps: Of a window of text, how many are decoded one by one.
        windows: Of held-out text.
        tries: Recall tasks of each kind, each asked in both protocols; 0 for none.
        rounds: Counted decoded tokens of a row and of dense, in turn, for its speed.
        budgets: See `saccade.catalog.Budget`.
        only: Rows in whose label this regular expression is found; None for all.
        parts: Of `PARTS`, to measure now; the table also has what notes say.
        notes: File of an earlier run with the same material, which is continued.
        progress: Told what is done next.

    Returns:
        The measurements.

    Raises:
        ValueError: If an argument is out of range, or longer than the model's context.
    """
    config = model.config.get_text_config()
    if context > config.max_position_embeddings:
        raise ValueError(f"context={context}: expected at most {config.max_position_embeddings}, the model's")
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts={part!r}: expected some of {', '.join(PARTS)}")
    material = make_material(tokenizer, context, steps, windows, tries)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    chosen, left_out = candidates(context, config.num_hidden_layers, budgets, rope)
    chosen = matching(chosen + composed(context, config.num_hidden_layers, rope), only)
    about = {
        "context": context, "steps": steps, "windows": len(material.windows), "tries": tries,
        "dtype": str(model.dtype).removeprefix("torch."), "parameters": model.num_parameters(),
    }  # fmt: skip
    log = Notes(about, notes)
    with _twin(model) as twin:
        for part in parts:
            _measure(part, model, twin, material, chosen, log, rounds, progress)
    dense = {part: log.found[key] for part in PARTS if (key := ("dense", "", part)) in log.found}
    table = [_row(log, one, dense) for one in (None, *chosen)]
    return CacheBench(about, tuple(table), left_out)


@contextmanager
def _twin(model: Any) -> Iterator[Any]:
    """The model once more, with the same weights and Saccade's dense attention."""
    from saccade.plug import Recipe, apply

    twin = deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    with apply(twin, Recipe.uniform(twin, "dense", {"engine": "saccade"})):
        yield twin


def _measure(
    part: str, model: Any, twin: Any, material: Material, chosen: Sequence[Candidate], log: Notes, rounds: int,
    progress: Callable[[str], object],
) -> None:  # fmt: skip
    """One part, of the rows that lack it; the prompt is read once for all."""
    names = [("dense", "", None), *((one.label, one.written, one.policy) for one in chosen)]
    lacking = [row for row in names if (row[0], row[1], part) not in log.found]
    ids = _beginnings(part, material)
    if not lacking or ids is None:
        return
    progress(f"{part}: prompt")
    prompt = read_prompt(twin, ids)
    if part == "speed":
        for group in (lacking[first : first + TOGETHER] for first in range(0, len(lacking), TOGETHER)):
            progress(f"{part}: {', '.join(name for name, _, _ in group)}")
            measured = _speeds(model, twin, [policy for _, _, policy in group], prompt, rounds)
            for (name, written, _), speed in zip(group, measured, strict=True):
                log.add(name, written, part, speed)
        return
    for name, written, policy in lacking:
        progress(f"{part}: {name}")
        log.add(name, written, part, _quality(part, model, twin, policy, prompt, material))


def _beginnings(part: str, material: Material) -> torch.Tensor | None:
    """Prompts of a part, int64 `[B, n]`; None where there is no material for it."""
    if part in PROTOCOLS:
        return None if material.questions is None else material.questions.ids[:, : -material.questions.answer]
    return material.windows[: 1 if part == "speed" else None, : -material.steps]


def _quality(
    part: str, model: Any, twin: Any, policy: CachePolicy | None, prompt: Prompt, material: Material
) -> dict[str, Any]:
    from saccade.plug.cache import cache_bytes

    runs, cache, counted = caches_of(model, twin, policy)
    if part == "text":
        return text_quality(runs, cache, counted, prompt, material, cache_bytes)
    if material.questions is None:
        raise ValueError(f"part={part!r}: expected tries above 0")
    return recall_quality(runs, cache, counted, prompt, material.questions, part, cache_bytes)


@torch.no_grad()
def _speeds(
    model: Any, twin: Any, policies: Sequence[CachePolicy | None], prompt: Prompt, rounds: int
) -> list[dict[str, Any]]:
    """Decoded tokens of one sequence with each and with dense, in turn: `tokens_per_second`, `speedup` over dense."""
    calls = {}
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    for number, policy in (("dense", None), *((str(i), policy) for i, policy in enumerate(policies))):
        runs, cache, _ = caches_of(model, twin, policy, count=False)
        prompt.fill(cache, sequences=1)
        calls[number] = lambda runs=runs, cache=cache: runs(input_ids=token, past_key_values=cache)
    seconds = {number: median(times) for number, times in interleaved(calls, rounds, warmup=2).items()}
    dense = seconds.pop("dense")
    return [{"tokens_per_second": 1 / row, "speedup": dense / row} for row in seconds.values()]


def _row(log: Notes, one: Candidate | None, dense: dict[str, dict[str, Any]]) -> CacheRow:
    """All that is known of a row, and beside dense."""
    label, written = ("dense", "") if one is None else (one.label, one.written)
    measured = {part: log.found[key] for part in PARTS if (key := (label, written, part)) in log.found}
    both = measured.keys() & dense.keys()
    ratio = measured["text"]["perplexity"] / dense["text"]["perplexity"] if "text" in both else None
    nats = {p: _answers(measured[p]) - _answers(dense[p]) for p in PROTOCOLS if p in both}
    if one is None:
        return CacheRow("dense", "", None, (), measured, ratio, nats)
    return CacheRow(one.name, written, one.budget, tuple(sorted(one.effects)), measured, ratio, nats)


def _answers(measured: dict[str, Any]) -> float:
    values = list(measured["log_prob"].values())
    return float(sum(values) / len(values))


__all__ = ["BUDGETS", "COLUMNS", "PARTS", "CacheBench", "CacheRow", "bench_cache"]
