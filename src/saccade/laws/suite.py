"""The fifteen laws in order, and running them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from saccade.catalog import get
from saccade.laws import numeric, semantics, system
from saccade.laws.base import Broken, NotApplicable, Verdict
from saccade.laws.subjects import Subject


@dataclass(frozen=True)
class Law:
    """One law: its number and title in the design, and a check that returns a note or raises."""

    number: int
    title: str
    check: Callable[[Subject], str]


LAWS = (
    Law(1, "reference agreement", numeric.reference_agreement),
    Law(2, "gradients", numeric.gradient_check),
    Law(3, "empty rows and poisoned padding", semantics.inert_padding),
    Law(4, "causality", semantics.causality),
    Law(5, "one answer, however the sequence is cut", semantics.one_answer),
    Law(6, "budgets", semantics.budgets),
    Law(7, "independence of batch, head order and grouping", numeric.independence),
    Law(8, "offsets past 2^31", system.wide_offsets),
    Law(9, "every output element written", numeric.everything_written),
    Law(10, "refusals", system.refusals),
    Law(11, "compilation", system.compilation),
    Law(12, "determinism", numeric.determinism),
    Law(13, "declared complexity", system.complexity),
    Law(14, "apply, undo, recipe", system.undo),
    Law(15, "sequence parallel", system.sharding),
)


def verify(name: str, device: str = "cpu", laws: Iterable[int] | None = None) -> list[Verdict]:
    """Run the laws on one mechanism.

    Args:
        name: Registry name.
        device: Where to run.
        laws: Numbers of the laws to run; None means all.

    Returns:
        One verdict per law, in order. An unexpected exception is a failure, with its text.

    Raises:
        ValueError: If `name` or a law's number is unknown.
    """
    card = get(name)
    wanted = set(range(1, len(LAWS) + 1)) if laws is None else set(laws)
    unknown = wanted - {law.number for law in LAWS}
    if unknown:
        raise ValueError(f"laws={sorted(unknown)}: expected numbers from 1 to {len(LAWS)}")
    return [run_law(law, Subject(card, device)) for law in LAWS if law.number in wanted]


def run_law(law: Law, subject: Subject) -> Verdict:
    """One law on one subject."""
    try:
        return Verdict(law.number, law.title, "passed", law.check(subject))
    except NotApplicable as reason:
        return Verdict(law.number, law.title, "skipped", str(reason))
    except Broken as fault:
        return Verdict(law.number, law.title, "failed", str(fault))
    except Exception as error:  # noqa: BLE001  a crash is a verdict, not the end of the run
        return Verdict(law.number, law.title, "failed", f"{type(error).__name__}: {error}")
