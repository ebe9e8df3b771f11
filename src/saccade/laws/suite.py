"""The fifteen laws in order, how each form of mechanism keeps them, and running them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from saccade.catalog import Card, get
from saccade.laws import caches, layers, numeric, parallel, probes, reducers, reuse, semantics, system
from saccade.laws.base import Broken, NotApplicable, Verdict
from saccade.laws.subjects import Subject, form_of

Check = Callable[[Subject], str]


@dataclass(frozen=True)
class Law:
    """One law: its number and title in the design."""

    number: int
    title: str


LAWS = (
    Law(1, "reference agreement"),
    Law(2, "gradients"),
    Law(3, "empty rows and poisoned padding"),
    Law(4, "causality"),
    Law(5, "one answer, however the sequence is cut"),
    Law(6, "budgets"),
    Law(7, "independence of batch, head order and grouping"),
    Law(8, "offsets past 2^31"),
    Law(9, "every output element written"),
    Law(10, "refusals"),
    Law(11, "compilation"),
    Law(12, "determinism"),
    Law(13, "declared complexity"),
    Law(14, "apply, undo, recipe"),
    Law(15, "sequence parallel"),
)


@dataclass(frozen=True)
class Form:
    """How mechanisms that are called alike keep the laws: a check by number of law, or why it says nothing."""

    checks: Mapping[int, Check]
    reasons: Mapping[int, str] = field(default_factory=dict)


PAIRWISE = Form(
    {
        1: numeric.reference_agreement,
        2: numeric.gradient_check,
        3: semantics.inert_padding,
        4: semantics.causality,
        5: semantics.one_answer,
        6: semantics.budgets,
        7: numeric.independence,
        8: system.wide_offsets,
        9: numeric.everything_written,
        10: system.refusals,
        11: system.compilation,
        12: numeric.determinism,
        13: system.complexity,
        14: system.undo,
        15: system.sharding,
    }
)

FORMS = {
    "pairwise": PAIRWISE,
    "layer": Form(layers.CHECKS, layers.REASONS),
    "reducer": Form(reducers.CHECKS, reducers.REASONS),
    "cache-policy": Form(caches.CHECKS, caches.REASONS),
    "parallel": Form(parallel.CHECKS, parallel.REASONS),
    "probe": Form(probes.CHECKS, probes.REASONS),
    "reuse": Form(reuse.CHECKS, reuse.REASONS),
}
"""By `saccade.laws.subjects.form_of`."""


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
    return [run_law(law, card, device) for law in LAWS if law.number in wanted]


def run_law(law: Law, card: Card, device: str = "cpu", settings: Mapping[str, Any] | None = None) -> Verdict:
    """One law on a mechanism, which need not be registered.

    Args:
        law: One of `LAWS`.
        card: What to judge.
        device: Where to run.
        settings: Hyperparameters; None means the card's `example`.

    Returns:
        The verdict; an unexpected exception is a failure, with its text.
    """
    try:
        form = FORMS[form_of(card)]
        if law.number in form.reasons:
            return Verdict(law.number, law.title, "skipped", form.reasons[law.number])
        return Verdict(law.number, law.title, "passed", form.checks[law.number](Subject(card, device, settings)))
    except NotApplicable as reason:
        return Verdict(law.number, law.title, "skipped", str(reason))
    except Broken as fault:
        return Verdict(law.number, law.title, "failed", str(fault))
    except Exception as error:  # noqa: BLE001  a crash is a verdict, not the end of the run
        return Verdict(law.number, law.title, "failed", f"{type(error).__name__}: {error}")
