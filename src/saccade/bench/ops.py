"""The engines against PyTorch and against the machine's limits: same work, interleaved, medians of at least 7.

Between the cases a matrix product is timed, the thermometer: where it moved by more than a tenth, other processes were
at work; the case is run once more, and marked if it moved again.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saccade.bench.case import Case, Work
from saccade.bench.cases import cases
from saccade.bench.measure import gemm_gflops, interleaved, keeping_memory, median, peak_bytes, quartiles
from saccade.ops import recording

FEWEST_ROUNDS = 7
MOVED = 0.10
"""Relative change of the thermometer from which a case is not trusted."""

ALIKE, DIFFERS = 0.02, " (another result!)"
"""Relative difference of two results up to which they count as the same in any dtype here; what a table says beyond."""


@dataclass(frozen=True)
class Outcome:
    """What one case measured, or why not.

    Args:
        name: Of the case.
        engine: Engines and implementations that ran.
        ours: Median seconds of one run.
        peers: Median seconds of each peer, its share counted.
        spreads: Of the rounds' own ratios to each peer the lower and upper quartile; of ours under "", the seconds.
        errors: Relative difference of each peer's result from ours (Frobenius norm), where they compute the same.
        gflops: Useful 10^9 operations a second.
        gbytes: 10^9 bytes read a second.
        peak_bytes: Memory that one run takes at its peak, its result included, or None where it cannot be measured.
        result_bytes: Of its result.
        thermometer: GFLOP/s of the thermometer before and after.
        noisy: Whether the thermometer moved also when the case was run again.
        skipped: Peers that did not run, and why; `case` for the case itself.
    """

    name: str
    engine: str = ""
    ours: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, tuple[float, float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    gflops: float | None = None
    gbytes: float | None = None
    peak_bytes: int | None = None
    result_bytes: int = 0
    thermometer: tuple[float, float] = (0.0, 0.0)
    noisy: bool = False
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ratios(self) -> dict[str, float]:
        """Time of each peer over ours: above 1, ours is faster."""
        return {} if self.ours is None else {name: seconds / self.ours for name, seconds in self.peers.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the ratios."""
        return asdict(self) | {"ratios": self.ratios}

    def _between(self, name: str, factor: float = 1.0) -> str:
        """The quartiles as a table shows them."""
        if name not in self.spreads:
            return ""
        low, high = (factor * bound for bound in self.spreads[name])
        return f" ({low:.2f} to {high:.2f})"

    def rows(self) -> list[tuple[str, ...]]:
        """For a table: a row per peer, the first with what is ours."""
        if self.ours is None:
            return [(self.name, "", "", "", f"skipped: {self.skipped.get('case', '')}", "", "", "")]
        rate = "" if self.gflops is None else f"{self.gflops:.0f} GFLOP/s"
        rate = rate if self.gbytes is None else f"{self.gbytes:.1f} GB/s"
        memory = "" if self.peak_bytes is None else f"{self.peak_bytes >> 20} ({self.result_bytes >> 20}) MiB"
        mark = " (noisy)" if self.noisy else ""
        lines = [
            (
                name + DIFFERS * (self.errors.get(name, 0) > ALIKE),
                f"{1e3 * seconds:.2f} ms",
                f"{self.ratios[name]:.2f}x{self._between(name)}",
            )
            for name, seconds in sorted(self.peers.items(), key=lambda item: item[1])
        ]
        lines += [(name, f"skipped: {reason}", "") for name, reason in self.skipped.items()]
        head = (self.name + mark, self.engine, f"{1e3 * self.ours:.2f} ms{self._between('', 1e3)}", rate, memory)
        shown = [head, *[("",) * 5] * (len(lines) - 1)] if lines else [head]
        return [(*left[:4], *line, left[4]) for left, line in zip(shown, lines or [("", "", "")], strict=True)]


COLUMNS = ("case", "engine", "ours", "rate", "against", "theirs", "ratio", "peak memory (result)")


def bench_ops(
    *,
    quick: bool = False,
    only: str | None = None,
    rounds: int = FEWEST_ROUNDS,
    starting: Callable[[str], object] = str,
    progress: Callable[[Outcome], object] = Outcome.rows,
) -> list[Outcome]:
    """Every case whose name `only` is found in.

    Args:
        quick: Small sizes, no compiled peers: a smoke run, not a measurement.
        only: Regular expression; None runs all.
        rounds: Counted rounds of each case.
        starting: Told which case runs next.
        progress: Called with each outcome as it is there.

    Returns:
        An outcome per case.

    Raises:
        ValueError: If `rounds` is too small, or `only` is not a regular expression or matches no case.
    """
    if rounds < FEWEST_ROUNDS and not quick:
        raise ValueError(f"rounds={rounds}: expected at least {FEWEST_ROUNDS}")
    chosen = select_cases(cases(quick=quick), only)
    outcomes = []
    for number, case in enumerate(chosen, 1):
        starting(f"{number} of {len(chosen)}: {case.name}")
        outcome = run_case(case, rounds)
        progress(outcome)
        outcomes.append(outcome)
    return outcomes


def select_cases(known: Iterable[Case], only: str | None) -> list[Case]:
    """Those whose name the regular expression `only` is found in; all for None."""
    try:
        pattern = re.compile(only or "")
    except re.error as error:
        raise ValueError(f"only={only!r}: not a regular expression: {error}") from None
    known = list(known)
    chosen = [case for case in known if pattern.search(case.name)]
    if not chosen:
        raise ValueError(f"only={only!r}: matches no case, such as {known[0].name!r}")
    return chosen


def run_case(case: Case, rounds: int, thermometer: Callable[[], float] = gemm_gflops) -> Outcome:
    """One case, and once more if the thermometer moved meanwhile.

    Args:
        case: What to run.
        rounds: Counted rounds.
        thermometer: Speed of something that should not change.

    Returns:
        What was measured the last time.
    """
    try:
        work = case.prepare()
    except ValueError as error:
        return Outcome(case.name, skipped={"case": str(error)})
    outcome = Outcome(case.name)
    for _ in range(2):
        before = thermometer()
        with torch.set_grad_enabled(case.grad):
            outcome = _measure(case.name, work, rounds)
        after = thermometer()
        moved = abs(after / before - 1) > MOVED
        outcome = replace(outcome, thermometer=(round(before, 1), round(after, 1)), noisy=moved)
        if not moved:
            break
    del work
    gc.collect()
    return outcome


def _measure(name: str, work: Work, rounds: int) -> Outcome:
    """Results compared, memory and times taken."""
    with recording() as records:
        result = work.ours()
    engine = " + ".join(dict.fromkeys(f"{run.op}:{run.impl}" for run in records if run.op != "select"))
    peers, skipped, errors = {}, dict(work.skipped), {}
    for key, peer in work.peers.items():
        try:
            found = peer.call()
        except (RuntimeError, ValueError) as error:
            skipped[key] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        peers[key] = peer
        if peer.same:
            errors[key] = difference(found, result)
        del found
    result_bytes = sum(x.nbytes for x in ((result,) if isinstance(result, Tensor) else result))
    del result
    memory = peak_bytes(work.ours)
    calls = {"": work.ours} | {key: peer.call for key, peer in peers.items()}
    with keeping_memory() if work.keeps_memory else nullcontext():
        times = interleaved(calls, rounds, before=work.before)
    ours = median(times[""])
    spreads = {
        key: quartiles([peer.share * b / a for a, b in zip(times[""], times[key], strict=True)])
        for key, peer in peers.items()
    }
    return Outcome(
        name=name,
        engine=engine,
        ours=ours,
        peers={key: peer.share * median(times[key]) for key, peer in peers.items()},
        spreads={"": quartiles(times[""]), **spreads},
        errors=errors,
        gflops=None if work.flops is None else work.flops / ours / 1e9,
        gbytes=None if work.bytes is None else work.bytes / ours / 1e9,
        peak_bytes=memory,
        result_bytes=result_bytes,
        skipped=skipped,
    )


def difference(found: Any, wanted: Any) -> float:
    """Largest relative difference, Frobenius norm, over a tensor or the tensors of a tuple."""
    pairs = [(found, wanted)] if isinstance(found, Tensor) else list(zip(found, wanted, strict=True))
    return max(
        float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp(min=1e-30))
        for a, b in pairs
    )
