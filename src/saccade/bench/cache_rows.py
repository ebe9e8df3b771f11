"""Which cache policies are measured, and with which settings: from the registry, at shares that are measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saccade.catalog import Card, cards
from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import CachePolicy, Everything
from saccade.types import Kind

BUDGETS = (0.5, 0.25, 0.1)
"""Parts of the cache's bytes that are held, or read, or that a token takes."""

TOLERANCE = 1.45
"""How far off a budget the nearest rung of a ladder may be, as a factor."""

SCALES = (1.0, 0.8)
"""Ladders are asked for a context and for this part of it: 10 % lies between their powers of two."""

TRIAL = 1024
"""Most tokens on which a setting's share is measured."""

DIM = 64
"""Channels of a head there."""


@dataclass(frozen=True)
class Shares:
    """Parts of dense attention's bytes: held of the cache, whole pages counted, and read in a step by a query head.

    Where query heads share keys and each has a list of its own, a token may be read once for each of them.
    """

    held: float
    read: float

    def of(self, effects: frozenset[str]) -> float:
        """The part that a policy with these effects sets out to make small."""
        return min(([self.held] if effects - {"selecting"} else []) + ([self.read] if "selecting" in effects else []))


@dataclass(frozen=True)
class Candidate:
    """A policy with the setting whose share is nearest to a budget.

    Args:
        name: Registry name.
        settings: Hyperparameters.
        policy: Built from them.
        budget: One of `BUDGETS`.
        shares: Measured on random keys, over as many layers as the model has.
        effects: Of its card.
    """

    name: str
    settings: Mapping[str, Any]
    policy: CachePolicy
    budget: float
    shares: Shares
    effects: frozenset[str]


def candidates(
    context: int, layers: int, budgets: Sequence[float] = BUDGETS, only: Sequence[str] | None = None
) -> tuple[list[Candidate], dict[str, str]]:
    """Every registered cache policy that has a ladder, at each budget that a rung comes near.

    Args:
        context: Tokens the settings are for.
        layers: Of the model.
        budgets: Parts of the bytes.
        only: Names; None for all.

    Returns:
        The candidates, by name and falling budget, and why other policies or budgets are left out.

    Raises:
        ValueError: If a budget is not in (0, 1) or a name is no cache policy.
    """
    for budget in budgets:
        if not 0 < budget < 1:
            raise ValueError(f"budget={budget}: expected a part of the bytes, more than 0 and less than 1")
    known = {card.name: card for card in cards() if card.kind is Kind.CACHE_POLICY}
    for name in only or ():
        if name not in known:
            raise ValueError(f"only={name!r}: expected some of {', '.join(known)}")
    found: list[Candidate] = []
    left_out: dict[str, str] = {}
    for card in known.values():
        if only is not None and card.name not in only:
            continue
        if card.ladder is None:
            left_out[card.name] = "its card has no ladder of settings"
            continue
        try:
            rungs = _rungs(card, context, layers)
        except ValueError as error:
            left_out[card.name] = str(error)
            continue
        for budget in budgets:
            chosen = _nearest(rungs, card, budget)
            if chosen is None:
                near = ", ".join(f"{shares.of(card.effects):.0%}" for _, shares in rungs)
                left_out[f"{card.name} at {budget:.0%}"] = f"no rung of its ladder comes near: {near}"
                continue
            settings, shares = chosen
            policy = card.build(**settings)
            found.append(Candidate(card.name, settings, policy, budget, shares, card.effects))
    return found, left_out


def matching(pattern: str | None) -> list[str] | None:
    """Names of cache policies in which a regular expression is found; None for None."""
    names = (card.name for card in cards() if card.kind is Kind.CACHE_POLICY)
    return None if pattern is None else [name for name in names if re.search(pattern, name)]


def _rungs(card: Card, context: int, layers: int) -> list[tuple[Mapping[str, Any], Shares]]:
    """Settings for the context, each with the shares that its like has on a shorter one."""
    tokens, found = min(context, TRIAL), list[tuple[Mapping[str, Any], Shares]]()
    for scale in SCALES:
        small, large = (card.ladder(max(int(n * scale), 1)) for n in (tokens, context))  # type: ignore[misc]
        for tried, wanted in zip(small, large, strict=True):
            if all(wanted != settings for settings, _ in found):
                found.append((wanted, shares_of(card.build(**tried), tokens, layers)))
    return found


def _nearest(
    rungs: list[tuple[Mapping[str, Any], Shares]], card: Card, budget: float
) -> tuple[Mapping[str, Any], Shares] | None:
    """The rung nearest to a budget, as a ratio; None if none is near."""
    ratios = [abs(math.log(shares.of(card.effects) / budget)) for _, shares in rungs]
    best = min(range(len(rungs)), key=ratios.__getitem__)
    return rungs[best] if ratios[best] <= math.log(TOLERANCE) else None


@torch.no_grad()
def shares_of(policy: CachePolicy, tokens: int, layers: int) -> Shares:
    """What a policy holds after a prompt of random tokens, and reads for the next one, beside keeping everything.

    Args:
        policy: The policy.
        tokens: Of the prompt.
        layers: That share their `Step`.

    Returns:
        Its shares.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens + 1, DIM, generator=generator) for heads in (2, 2, 2))
    held, read = [], []
    for one in (policy, Everything()):
        stack = CachedAttention.stack(one, layers)
        for piece in (slice(0, tokens), slice(tokens, tokens + 1)):
            for layer in stack:
                layer(*(x[:, :, piece] for x in (q, k, v)))
        held.append(sum(layer.nbytes for layer in stack))
        read.append(sum(layer.bytes_read for layer in stack))
    return Shares(held[0] / held[1], read[0] / read[1])


__all__ = ["BUDGETS", "Candidate", "Shares", "candidates", "matching", "shares_of"]
