"""Every mechanism of a room on the same work, beside random blocks and the best keys of the same density."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.bench.compare import Problem, relative_error
from saccade.bench.measure import Machine, describe_machine, interleaved, median
from saccade.catalog import cards
from saccade.catalog.card import ROOMS, Card
from saccade.ops import block_attend, recording
from saccade.ops.dispatch import density_of
from saccade.types import BlockLayout, Geometry, Kind, Pattern

ORACLE_QUERIES = 256
"""Queries, evenly spread, that the best keys are looked up for."""

RANDOM_BLOCK, LEAST_BLOCK = 64, 8
"""Tokens of a random block, a side: the most, and the least that it is halved to for a query to have four of them."""

COLUMNS = (
    "mechanism", "settings", "density", "error", "worst", "error of the best keys", "of random blocks", "choosing",
    "time", "speed-up",
)  # fmt: skip


@dataclass(frozen=True)
class RoomRow:
    """One mechanism with one setting, over all problems.

    Args:
        mechanism: Registry name.
        settings: Its hyperparameters, `name=value` with commas between.
        density: Kept pairs over those that dense attention computes, mean.
        error: Relative difference from dense attention, Frobenius norm, mean over the problems.
        worst_error: The largest.
        oracle_error: Mean error if each query had its highest-scoring keys, as many as that density allows.
        random_error: Mean error of random blocks of that density (`random_blocks`).
        select_seconds: Time of choosing what to compute, mean.
        seconds: Time of a call, choosing included, mean.
        speedup: Dense time over this time.
    """

    mechanism: str
    settings: str
    density: float
    error: float
    worst_error: float
    oracle_error: float
    random_error: float
    select_seconds: float
    seconds: float
    speedup: float


@dataclass(frozen=True)
class RoomComparison:
    """What `compare_room` measured.

    Args:
        problem: What the inputs are.
        machine: Where.
        dense_seconds: Mean time of dense attention.
        rows: By mechanism and density.
        left_out: Mechanisms of the room that could not be run, and why.
    """

    problem: str
    machine: Machine
    dense_seconds: float
    rows: tuple[RoomRow, ...]
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "machine": self.machine.to_json(), "rows": [asdict(row) for row in self.rows]}

    def markdown(self) -> str:
        """The table, for a document."""
        lines: list[tuple[str, ...]] = [COLUMNS, ("---",) * 2 + ("---:",) * (len(COLUMNS) - 2)]
        lines += [("`" + row[0] + "`", *row[1:]) for row in map(cells, self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(row: RoomRow) -> tuple[str, ...]:
    """A row as text, in the order of the table."""
    errors = (row.error, row.worst_error, row.oracle_error, row.random_error)
    return (
        row.mechanism, row.settings, f"{row.density:.1%}", *(f"{error:.3f}" for error in errors),
        f"{row.select_seconds * 1e3:.0f} ms", f"{row.seconds * 1e3:.0f} ms", f"{row.speedup:.2f}",
    )  # fmt: skip


def compare_room(
    room: str,
    problems: Iterable[Problem],
    *,
    rounds: int = 3,
    problem: str = "given tensors",
    only: str | None = None,
    progress: Callable[[str], object] = str,
) -> RoomComparison:
    """Run every selector of a room, with each setting of its ladder, on the same problems.

    Args:
        room: Such as "where".
        problems: Queries, keys and values with one geometry, such as those of several layers of a model.
        rounds: Counted rounds on each problem; the median is taken.
        problem: What the inputs are, for the heading.
        only: Rows whose `name(setting=value, ...)` this regular expression is found in; None for all.
        progress: Told each row as it is measured, in words.

    Returns:
        A row per mechanism and setting, averaged over the problems.

    Raises:
        ValueError: If `rounds` is less than 1, there are no problems, or nothing in the room that is asked for can run
            on them.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1")
    given = list(problems)
    if not given:
        raise ValueError("problems: expected at least one")
    if room not in ROOMS:
        raise ValueError(f"room={room!r}: expected one of {', '.join(ROOMS)}")
    built, left_out = _build(room, given[0], only)
    found: dict[tuple[str, str], list[RoomRow]] = {}
    dense_seconds = []
    with torch.no_grad():
        for place, one in enumerate(given if built else ()):
            wanted, oracle = one.dense(), Oracle(one)
            base = median(interleaved({"dense": one.dense}, rounds)["dense"])
            dense_seconds.append(base)
            for (name, settings), mechanism in built.items():
                if name in left_out:
                    continue
                try:
                    row = _measure(one, mechanism, wanted, oracle, base, rounds)
                except ValueError as error:
                    left_out[name] = str(error)
                    continue
                found.setdefault((name, settings), []).append(replace(row, mechanism=name, settings=settings))
                said = f"{row.density:.1%}, error {row.error:.3f}, random blocks {row.random_error:.3f}"
                progress(f"problem {place + 1} of {len(given)}: {name}({settings}): {said}")
    means = [_mean(rows) for (name, _), rows in found.items() if name not in left_out]
    if not means:
        asked = "" if only is None else f", only={only!r}"
        raise ValueError(f"room={room!r}{asked}: expected one with a mechanism that can run here, got {left_out}")
    rows = tuple(sorted(means, key=lambda row: (row.mechanism, row.density)))
    return RoomComparison(problem, describe_machine(), statistics.fmean(dense_seconds), rows, left_out)


def _build(room: str, problem: Problem, only: str | None) -> tuple[dict[tuple[str, str], Any], dict[str, str]]:
    """(name, settings) -> mechanism for what is asked of the room for such problems, and why the others are not."""
    built: dict[tuple[str, str], Any] = {}
    left_out: dict[str, str] = {}
    for card in (card for card in cards() if card.room == room):
        reason = _why_not(card, problem.geometry)
        if reason is not None:
            left_out[card.name] = reason
            continue
        for settings in card.ladder(problem.q.shape[2]):  # type: ignore[misc]
            words = ", ".join(f"{key}={value}" for key, value in settings.items())
            if only is None or re.search(only, f"{card.name}({words})"):
                built[card.name, words] = card.build(**settings)
    return built, left_out


def _why_not(card: Card, geometry: Geometry) -> str | None:
    pattern = Pattern.CAUSAL_SELF if geometry.causal else Pattern.NONCAUSAL_SELF
    if card.kind is not Kind.SELECTOR:
        return f"of kind {card.kind}: approximates no dense attention over given q, k, v"
    if pattern not in card.patterns:
        return f"not for {pattern} attention"
    if card.ladder is None:
        return "its card has no ladder of settings"
    return None


def _measure(one: Problem, mechanism: Any, wanted: Tensor, oracle: Oracle, base: float, rounds: int) -> RoomRow:
    """One mechanism on one problem; the recorded run warms up for the timed ones."""
    with recording() as records:
        out = one.run(mechanism)
    error = relative_error(out, wanted)
    density = density_of(records) or 0.0
    if one.geometry.causal:
        density *= 2 * one.k.shape[2] / (one.k.shape[2] + 1)
    seconds = median(interleaved({"it": lambda: one.run(mechanism)}, rounds, warmup=0)["it"])
    select = sum(record.select_seconds for record in records)
    chosen = random_blocks(one.q, one.geometry, density)
    random_error = relative_error(block_attend(one.q, one.k, one.v, chosen, scale=one.scale), wanted)
    return RoomRow("", "", density, error, error, oracle.error(density), random_error, select, seconds, base / seconds)


def _mean(rows: list[RoomRow]) -> RoomRow:
    """The mean of a mechanism's rows on all problems, and its worst error."""
    names = ("density", "error", "oracle_error", "random_error", "select_seconds", "seconds", "speedup")
    means = {name: statistics.fmean(getattr(row, name) for row in rows) for name in names}
    return replace(rows[0], worst_error=max(row.error for row in rows), **means)  # type: ignore[arg-type]


def random_blocks(q: Tensor, geometry: Geometry, density: float, *, seed: int = 0) -> BlockLayout:
    """Random key blocks for each head and query block; in causal attention its own among them, so that all see some.

    Args:
        q: `[B, H, N, D]`, as many keys.
        geometry: Whether causal.
        density: Kept pairs over those that dense attention computes.
        seed: Of the draw.

    Returns:
        The layout.
    """
    heads, tokens = q.shape[1:3]
    block = RANDOM_BLOCK
    while block > LEAST_BLOCK and density * tokens < 4 * block:
        block //= 2
    blocks = -(-tokens // block)
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(1, heads, blocks, blocks, generator=generator).to(q.device)
    rounding = torch.rand(1, heads, blocks, 1, generator=generator).to(q.device)
    if geometry.causal:
        score.diagonal(dim1=2, dim2=3).fill_(2.0)
    place = torch.arange(blocks, device=q.device)[:, None]
    if geometry.causal:
        score.masked_fill_(place < place.T, -1.0)
        keep = density * (place + 0.5) + 0.5  # half of the own block lies in the future
    else:
        keep = torch.full_like(place, blocks) * density
    keep = (keep + rounding).floor().clamp(min=1)
    rank = score.argsort(dim=-1, descending=True).argsort(dim=-1)
    layout = BlockLayout.from_block_mask(rank < keep, block, block, tokens, tokens)
    return layout.within(Geometry(causal=geometry.causal))


class Oracle:
    """Attention to each query's highest-scoring keys, on some queries: what no choice of keys of that size can beat.

    Args:
        problem: What to attend to.
    """

    def __init__(self, problem: Problem) -> None:
        q, k, v = problem.q, problem.k, problem.v
        tokens, shared = q.shape[2], q.shape[1] // k.shape[1]
        last = torch.arange(1, min(ORACLE_QUERIES, tokens) + 1, device=q.device) * tokens // min(ORACLE_QUERIES, tokens)
        scale = q.shape[3] ** -0.5 if problem.scale is None else problem.scale
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
        scores = (q[:, :, last - 1].float() @ k.float().transpose(2, 3)) * scale
        self.visible = torch.full_like(last, tokens)
        if problem.geometry.causal:
            self.visible = last
            scores = scores.masked_fill(torch.arange(tokens, device=q.device) >= last[:, None], -torch.inf)
        self.scores, self.v = scores, v.float()
        self.rank = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
        self.wanted = scores.softmax(-1) @ self.v

    def error(self, density: float) -> float:
        """Relative difference from dense attention if each query has this part of the keys it may see."""
        keep = (density * self.visible).ceil().clamp(min=1)
        kept = self.scores.masked_fill(self.rank >= keep[:, None], -torch.inf)
        return relative_error(kept.softmax(-1) @ self.v, self.wanted)
