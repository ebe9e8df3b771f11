"""Do trainable mechanisms train? Each on a small real task, with its own choice and with as much that is random."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from saccade.bench.digits import LEARNERS, learn_digits
from saccade.bench.recall import CASES, Outcome, recall

COLUMNS = ("mechanism", "task", "its choice", "random", "margin", "least margin", "read", "seconds")


@dataclass(frozen=True)
class Training:
    """A mechanism on its task, with several seeds.

    Args:
        name: Mechanism.
        task: "recall" of labels by name (guessing gives 25 %), or "digits".
        outcomes: Of each seed.
        seconds: Of all trainings.
    """

    name: str
    task: str
    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def chosen(self) -> float:
        """Mean score with its own choice."""
        return statistics.fmean(outcome.chosen for outcome in self.outcomes)

    @property
    def drawn(self) -> float:
        """Mean score with as much that is random."""
        return statistics.fmean(outcome.drawn for outcome in self.outcomes)

    @property
    def margin(self) -> float:
        """What the choice is worth."""
        return self.chosen - self.drawn

    def to_json(self) -> dict[str, Any]:
        """Its fields and the means."""
        return asdict(self) | {"chosen": self.chosen, "drawn": self.drawn, "margin": self.margin}

    def rows(self) -> list[tuple[str, ...]]:
        """A row of the table."""
        reads = [outcome.density for outcome in self.outcomes if outcome.density is not None]
        share, least = f"{statistics.fmean(reads):.0%}" if reads else "", min(one.margin for one in self.outcomes)
        scores = (f"{self.chosen:.1%}", f"{self.drawn:.1%}", f"{self.margin:+.1%}", f"{least:+.1%}")
        return [(self.name, self.task, *scores, share, f"{self.seconds:.0f}")]


def bench_training(
    steps: int = 400, only: str | None = None, seeds: int = 2, progress: Callable[[Training], None] | None = None
) -> list[Training]:
    """Train every mechanism of `recall.CASES` and `digits.LEARNERS`, with its choice and without.

    Args:
        steps: Of the optimizer, each on 32 new sequences or images.
        only: Mechanisms whose name this regular expression is found in.
        seeds: How often, from 0 on.
        progress: Called with every result.

    Returns:
        The results, by name.

    Raises:
        ImportError: If a digits task is asked for and scikit-learn is not installed.
    """
    tasks = dict.fromkeys(CASES, ("recall", recall)) | dict.fromkeys(LEARNERS, ("digits", learn_digits))
    results = []
    for name, (task, learn) in sorted(tasks.items()):
        if only is not None and not re.search(only, name):
            continue
        start = time.perf_counter()
        outcomes = tuple(learn(name, steps, seed=seed) for seed in range(seeds))
        results.append(Training(name, task, outcomes, time.perf_counter() - start))
        if progress is not None:
            progress(results[-1])
    return results
