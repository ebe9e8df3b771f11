"""Which cache policies are measured, with which settings: from the registry, at budgets; and some of several axes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saccade.catalog import Budget, cards
from saccade.mechanisms.cache.base import CachePolicy, Everything, compose
from saccade.mechanisms.cache.storage import FORMS, Storage
from saccade.types import Kind

BUDGETS = (0.5, 0.25, 0.1)
"""Parts of the tokens that are kept, or attended to in a step; or of 16 bits, in which a token is stored."""

BESIDE = 0.75
"""Part of the tokens that is kept where the rest is saved by 8 bits."""


@dataclass(frozen=True)
class Candidate:
    """A policy with the settings of its paper at a budget.

    Args:
        name: Registry name, or what is composed.
        settings: Hyperparameters.
        policy: Built from them.
        budget: Part of the tokens, or of 16 bits; None where nothing but the form of storage saves.
        effects: Keys of `saccade.catalog.card.EFFECTS`.
    """

    name: str
    settings: Mapping[str, Any]
    policy: CachePolicy
    budget: float | None
    effects: frozenset[str]

    @property
    def label(self) -> str:
        """Name and budget."""
        return self.name if self.budget is None else f"{self.name} at {self.budget:.0%}"

    @property
    def written(self) -> str:
        """`name=value`, with commas between."""
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


def candidates(
    context: int, layers: int, budgets: Sequence[float] = BUDGETS, rope: float | None = None
) -> tuple[list[Candidate], dict[str, str]]:
    """Every registered cache policy whose card names settings at a budget.

    Args:
        context: Tokens the settings are for.
        layers: Of the model.
        budgets: See `Budget.part`.
        rope: Base of the model's rotary embedding.

    Returns:
        The candidates, by name and falling budget, and why other policies or budgets are left out.

    Raises:
        ValueError: If a budget is not in (0, 1).
    """
    for budget in budgets:
        if not 0 < budget < 1:
            raise ValueError(f"budget={budget}: expected a part of the bytes, more than 0 and less than 1")
    found: list[Candidate] = []
    left_out: dict[str, str] = {}
    for card in (card for card in cards() if card.kind is Kind.CACHE_POLICY):
        if card.at_budget is None:
            left_out[card.name] = "its card names no settings at a budget"
            continue
        for part in budgets:
            settings = card.at_budget(Budget(part, context, layers, rope))
            if settings is None:
                left_out[f"{card.name} at {part:.0%}"] = f"its rule has none so small with {layers} layers"
            else:
                found.append(Candidate(card.name, settings, card.build(**settings), part, card.effects))
    return found, left_out


def composed(context: int, layers: int, rope: float | None = None) -> list[Candidate]:
    """Rows of several axes, for what is evicted from the registry: bits, and every evicting policy beside 8 bits.

    Args:
        context: As in `candidates`.
        layers: As there.
        rope: As there.

    Returns:
        The candidates.
    """
    packing = frozenset({"packing"})
    forms = [("everything", Storage()), *((f"{form.bits} bits", form) for form in FORMS)]
    found = [Candidate(name, {}, Everything(form), None, packing) for name, form in forms]
    kept, _ = candidates(context, layers, (BESIDE,), rope)
    for one in kept:
        if one.effects == {"evicting"}:
            policy = compose(keep=one.policy, store=FORMS[0])
            found.append(
                Candidate(f"{one.name} + {FORMS[0].bits} bits", one.settings, policy, one.budget, one.effects | packing)
            )
    return found


def placed(context: int) -> list[Candidate]:
    """Rows of every registered policy that only says where all is kept: in another process, in reserved addresses.

    Args:
        context: Tokens the settings are for.

    Returns:
        The candidates.
    """
    found = []
    for card in cards():
        if card.effects and card.effects <= {"offloading", "mapping"} and card.exact is not None:
            settings = card.exact(context)
            found.append(Candidate(card.name, settings, card.build(**settings), None, card.effects))
    return found


def matching(rows: Sequence[Candidate], pattern: str | None) -> list[Candidate]:
    """Those in whose label a regular expression is found; all for None.

    Args:
        rows: Candidates.
        pattern: Regular expression.

    Returns:
        Some of them.

    Raises:
        ValueError: If it is found in none.
    """
    found = [one for one in rows if pattern is None or re.search(pattern, one.label)]
    if not found:
        raise ValueError(f"only={pattern!r}: expected a part of one of {', '.join(one.label for one in rows)}")
    return found


__all__ = ["BUDGETS", "Candidate", "candidates", "composed", "matching", "placed"]
