"""Which implementation of an engine runs, and the record of what ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from saccade.kernels import cpu


@dataclass(frozen=True)
class Implementation:
    """One way to run an engine.

    Args:
        name: What `impl=` calls it.
        run: The function.
        refuses: Takes the call's arguments by name; the reason why it cannot run, or None.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[[Mapping[str, Any]], str | None] = lambda call: None  # noqa: ARG005


@dataclass
class RunRecord:
    """What one engine call did; collected by `recording`.

    Args:
        op: Engine.
        impl: Implementation that ran.
        refused: For each implementation passed over, why.
        density: Fraction of the M x N pairs computed, or None where the notion does not apply. A selector says it of
            the whole where its engines' calls do not tell.
        select_seconds: Time spent choosing what to compute, added by the selector.
        instruction_set: What the C++ engine ran on, where `impl` is "cpu".
        pairs: M * N, or None where there are none.
    """

    op: str
    impl: str
    refused: dict[str, str] = field(default_factory=dict)
    density: float | None = None
    select_seconds: float = 0.0
    instruction_set: str | None = None
    pairs: int | None = None

    def __str__(self) -> str:
        """Engine and implementation, as in `attend:cpu (AVX2 and FMA)`."""
        return f"{self.op}:{self.impl}" + ("" if self.instruction_set is None else f" ({self.instruction_set})")


def density_of(records: Iterable[RunRecord]) -> float | None:
    """Fraction of the pairs that a mechanism's call computed, from its records: what it says itself, else its engines.

    A call to fewer keys, which stand for several, counts by what it computes of the largest call's pairs.

    Args:
        records: Of one call, in order; what a selector ran to choose comes before its own record.

    Returns:
        The fraction, or None where nothing says it.
    """
    runs = list(records)
    chosen = max((place for place, run in enumerate(runs) if run.op == "select"), default=-1)
    if chosen >= 0 and runs[chosen].density is not None:
        return runs[chosen].density
    known = [(run.density, run.pairs) for run in runs[chosen + 1 :] if run.density is not None]
    whole = max((pairs for _, pairs in known if pairs is not None), default=None)
    if not known:
        return None
    return sum(density * (pairs / whole if pairs is not None and whole else 1.0) for density, pairs in known)


_records: ContextVar[list[RunRecord] | None] = ContextVar("saccade_records", default=None)


@contextmanager
def recording() -> Iterator[list[RunRecord]]:
    """Collect a `RunRecord` for each engine call made inside, in this thread or task only."""
    records: list[RunRecord] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def is_recording() -> bool:
    """Whether someone reads the records (never while torch.compile traces)."""
    return not torch.compiler.is_compiling() and _records.get() is not None


def record(entry: RunRecord) -> None:
    """Add `entry` for whoever is recording."""
    records = None if torch.compiler.is_compiling() else _records.get()
    if records is not None:
        if entry.impl == "cpu":
            entry.instruction_set = cpu.instruction_set()
        records.append(entry)


def cpu_engine() -> str:
    """The instruction set that the C++ engine uses, or why there is no engine."""
    return cpu.missing() or str(cpu.instruction_set())


def choose(
    op: str, implementations: Mapping[str, Implementation], impl: str, call: Mapping[str, Any]
) -> tuple[Implementation, dict[str, str]]:
    """The implementation to run and why those before it were passed over.

    Args:
        op: Engine, for messages.
        implementations: By name, ordered by preference.
        impl: "auto" takes the first that does not refuse, but never "reference"; a name runs or raises.
        call: The arguments of the engine by name.

    Returns:
        The implementation, and for each one passed over the reason.

    Raises:
        ValueError: If `impl` is unknown, or the one asked for (or every one) refuses the call.
    """
    if impl != "auto":
        if impl not in implementations:
            raise ValueError(f"impl={impl!r}: {op} has 'auto', {', '.join(map(repr, implementations))}")
        reason = implementations[impl].refuses(call)
        if reason is not None:
            raise ValueError(f"impl={impl!r}: {op} cannot run it here: {reason}")
        return implementations[impl], {}
    refused: dict[str, str] = {}
    for candidate in implementations.values():
        if candidate.name == "reference":
            continue
        reason = candidate.refuses(call)
        if reason is None:
            return candidate, refused
        refused[candidate.name] = reason
    raise ValueError(f"{op}: no implementation can run this call: {refused}")
