"""Named mechanisms on the same queries, keys and values: error, time, memory, density, crossover length."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.bench.measure import Machine, describe_machine, interleaved, median, peak_bytes
from saccade.catalog import get
from saccade.mechanisms.base import Mixer
from saccade.ops import attend, recording
from saccade.ops.dispatch import density_of
from saccade.types import Geometry, Kind, Pattern

COMPARABLE = (Kind.SELECTOR, Kind.SCORE, Kind.MIXER, Kind.INTERVENTION)
CAUSAL = Geometry(causal=True)
CROSSOVER_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Row:
    """One mechanism on one problem.

    Args:
        label: Name and settings.
        error: Relative difference from dense attention, Frobenius norm.
        seconds: Median time of a call, choosing included.
        select_seconds: Time of choosing what to compute, within `seconds`.
        speedup: Dense time over this time.
        peak_bytes: Memory at the peak of one call, None where it cannot be measured.
        density: Kept pairs over those dense attention computes, None where there are no pairs.
        crossover: Shortest length tried from which it stays faster than dense, None if there is none.
    """

    label: str
    error: float
    seconds: float
    select_seconds: float
    speedup: float
    peak_bytes: int | None
    density: float | None
    crossover: int | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured; `dense` is the row everything is measured against."""

    problem: str
    machine: Machine
    dense: Row
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "problem": self.problem,
            "machine": self.machine.to_json(),
            "rows": [asdict(row) for row in (self.dense, *self.rows)],
        }


def parse_mechanism(text: str) -> tuple[str, dict[str, Any] | None]:
    """`name` or `name:setting=value,setting=value` with JSON values; without settings the card's ladder is meant.

    Args:
        text: Such as `sink_window:window=512,sinks=4`.

    Returns:
        Registry name and settings; None for the settings means the ladder.

    Raises:
        ValueError: If the name is unknown or a setting cannot be read.
    """
    name, _, rest = text.partition(":")
    card = get(name)
    if not rest:
        return card.name, None
    settings: dict[str, Any] = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        try:
            settings[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"settings={part!r}: expected setting=value with a JSON value, as in window=512") from None
        if not equals or not key.strip():
            raise ValueError(f"settings={part!r}: expected setting=value")
    return card.name, settings


def compare(
    mechanisms: Iterable[str],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    geometry: Geometry = CAUSAL,
    scale: float | None = None,
    rounds: int = 5,
    crossover: bool = True,
    problem: str = "given tensors",
) -> Comparison:
    """Run mechanisms and dense attention on the same inputs, in interleaved rounds.

    Args:
        mechanisms: `name` (every setting of its ladder) or `name:setting=value,...`.
        q: `[B, H, N, D]`.
        k: `[B, G, N, D]`.
        v: `[B, G, N, E]`.
        geometry: Causality and grid.
        scale: Factor on q k^T; None means D^-0.5.
        rounds: Counted rounds; the median is reported.
        crossover: Also look for the length from which each is faster than dense (takes longer).
        problem: What the inputs are, for the heading.

    Returns:
        Rows in the order given.

    Raises:
        ValueError: If a mechanism is unknown, cannot run on q, k, v, or `rounds` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1")
    device, causal = str(q.device), geometry.causal
    built = _build(mechanisms, q.shape[2], causal)

    whole = Problem(q, k, v, geometry, scale)
    calls = {"dense": whole.dense} | {label: partial(whole.run, mechanism) for label, mechanism in built.items()}
    with torch.no_grad():
        wanted = whole.dense()
        times = interleaved(calls, rounds, device=device)
        crossings = _crossovers(whole, built, device) if crossover else {}
        base = median(times["dense"])
        rows = [
            _row(label, calls[label], wanted, times[label], base, crossings.get(label), causal=causal)
            for label in built
        ]
        dense_row = Row("dense", 0.0, base, 0.0, 1.0, peak_bytes(whole.dense, device), 1.0, None)
    return Comparison(problem, describe_machine(device.split(":", maxsplit=1)[0]), dense_row, tuple(rows))


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs that every mechanism is called on."""

    q: Tensor
    k: Tensor
    v: Tensor
    geometry: Geometry
    scale: float | None

    def head(self, tokens: int) -> Problem:
        """The first `tokens` tokens."""
        return replace(self, q=self.q[:, :, :tokens], k=self.k[:, :, :tokens], v=self.v[:, :, :tokens])

    def dense(self) -> Tensor:
        """Dense attention."""
        return attend(self.q, self.k, self.v, causal=self.geometry.causal, scale=self.scale)

    def run(self, mechanism: Any) -> Tensor:
        """A mechanism's output; mixers have no scale of their own to set."""
        options = {} if isinstance(mechanism, Mixer) else {"scale": self.scale}
        out: Tensor = mechanism(self.q, self.k, self.v, geometry=self.geometry, **options)
        return out


def relative_error(out: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`, in fp64."""
    return float((out.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def _build(mechanisms: Iterable[str], tokens: int, causal: bool) -> dict[str, Any]:
    """Label -> mechanism, for every setting asked for."""
    built: dict[str, Any] = {}
    pattern = Pattern.CAUSAL_SELF if causal else Pattern.NONCAUSAL_SELF
    for text in mechanisms:
        name, settings = parse_mechanism(text)
        card = get(name)
        if card.kind not in COMPARABLE or pattern not in card.patterns:
            known = ", ".join(sorted(card.patterns))
            raise ValueError(f"mechanisms={name!r}: of kind {card.kind}, for {known}: cannot run on {pattern} q, k, v")
        steps: tuple[Any, ...] = (dict(card.example) if settings is None else settings,)
        if settings is None and card.ladder is not None:
            steps = card.ladder(tokens)
        for step in steps:
            inside = ", ".join(f"{key}={value}" for key, value in step.items())
            built[f"{name}({inside})"] = card.build(**step)
    return built


def _row(
    label: str,
    run: Callable[[], Tensor],
    wanted: Tensor,
    times: list[float],
    base: float,
    crossover: int | None,
    *,
    causal: bool,
) -> Row:
    with recording() as records:
        out = run()
    density = density_of(records)
    tokens = wanted.shape[2]
    if density is not None and causal:
        density *= 2 * tokens / (tokens + 1)
    error = relative_error(out, wanted)
    select = sum(record.select_seconds for record in records)
    seconds = median(times)
    return Row(label, error, seconds, select, base / seconds, peak_bytes(run, str(out.device)), density, crossover)


def _crossovers(whole: Problem, built: dict[str, Any], device: str) -> dict[str, int]:
    """For each label, the shortest length from which it is faster than dense at every longer one tried."""
    faster: dict[int, set[str]] = {}
    for length in (n for n in CROSSOVER_LENGTHS if n <= whole.q.shape[2]):
        part = whole.head(length)
        calls = {"dense": part.dense} | {label: partial(part.run, mechanism) for label, mechanism in built.items()}
        times = {label: min(values) for label, values in interleaved(calls, rounds=3, device=device).items()}
        faster[length] = {label for label, seconds in times.items() if seconds < times["dense"]}
    found: dict[str, int] = {}
    for label in built:
        for length in sorted(faster, reverse=True):
            if label not in faster[length]:
                break
            found[label] = length
    return found
