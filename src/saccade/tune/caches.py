"""Which key/value caches a tuned model may get: everything kept in pages, and what the registry has that holds less."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import Card, cards
from saccade.catalog.card import Budget
from saccade.mechanisms.cache.storage import FORMS, Storage
from saccade.ops import decode_attend, recording
from saccade.plug import LayerCache, PolicyChoice, Recipe, apply
from saccade.plug.cache_recipe import axes_of, dump_cache, in_words
from saccade.tune.candidates import DENSE, Candidate
from saccade.types import Kind, KVPages

TOLERANCE = 1e-2
"""Largest difference of logits, absolute and relative, at which two caches are taken to be the same."""

PARTS = (0.5, 0.75, 0.25)
"""Budgets of the policies, see `Budget.part`."""


@dataclass(frozen=True)
class CacheCandidate:
    """A layer's cache that holds less than everything as it comes, or just that.

    Args:
        cache: What it keeps, reads and stores.
    """

    cache: LayerCache

    @property
    def label(self) -> str:
        """In words."""
        return in_words(self.cache.build())

    @property
    def key(self) -> str:
        """A stable name for files."""
        return json.dumps(dump_cache(self.cache), sort_keys=True)


def find_cache_candidates(
    context: int, layers: int = 1, rope: float | None = None, *, quick: bool = False
) -> tuple[list[CacheCandidate], dict[str, str]]:
    """Everything, all evicting and packing policies at the budgets `PARTS`, and storage of fewer bits.

    Args:
        context: Tokens of a prompt.
        layers: Of the model.
        rope: Base of its rotary embedding, or None.
        quick: Only at the first of the budgets.

    Returns:
        `(candidates, left_out)`, keeping everything as it comes first; `left_out` maps each other policy to the reason.
    """
    found, left_out = [CacheCandidate(LayerCache())], dict[str, str]()
    budgets = [Budget(part, context, layers, rope) for part in (PARTS[:1] if quick else PARTS)]
    for card in cards():
        if card.kind is not Kind.CACHE_POLICY:
            continue
        reason = _why_not(card)
        if reason is not None:
            left_out[card.name] = reason
            continue
        axis = "keep" if "evicting" in card.effects else "store"
        for settings in map(card.at_budget, budgets):  # type: ignore[arg-type]
            if settings is not None:
                candidate = CacheCandidate(LayerCache(**{axis: PolicyChoice(card.name, settings)}))
                found += [] if candidate in found else [candidate]
    return found + [CacheCandidate(LayerCache(store=form)) for form in FORMS], left_out


def _why_not(card: Card) -> str | None:
    """Why the tuner does not try this policy for fewer bytes, or None."""
    if not card.effects & {"evicting", "packing"}:
        return f"{' and '.join(sorted(card.effects))}: holds as many bytes as dense attention does"
    axis = "keep" if "evicting" in card.effects else "store"
    if axis not in axes_of(card.target):
        return f"does not decide what a recipe's cache calls {axis!r}"
    if not card.training_free:
        return "needs training"
    if card.at_budget is None:
        return "its card does not say its settings at a budget"
    return None


def combined(candidates: list[CacheCandidate]) -> list[tuple[LayerCache, tuple[int, ...]]]:
    """Each candidate, and each that evicts in each storage, with the places among the candidates that it is made of."""
    found: list[tuple[LayerCache, tuple[int, ...]]] = []
    for place, candidate in enumerate(candidates):
        found.append((candidate.cache, (place,)))
        if candidate.cache.keep is not None:
            found += [
                (LayerCache(keep=candidate.cache.keep, store=other.cache.store), (place, number))
                for number, other in enumerate(candidates)
                if isinstance(other.cache.store, Storage)
            ]
    return found


def exact_cache(model: Any, dense: Candidate) -> tuple[LayerCache | None, str]:
    """The cache of layers that keep everything as it comes, if it can serve the model and is worth it.

    Pages are read in place by a kernel; without one decoding would gather them first, which transformers' own cache
    need not.

    Args:
        model: A transformers causal language model.
        dense: Dense attention as the recipe will have it.

    Returns:
        The cache, or None, and why there is none.
    """
    x = torch.zeros(1, 1, 64, 16, device=model.device, dtype=model.dtype)
    with recording() as records:
        decode_attend(x[:, :, :1], KVPages.from_dense(x, x))
    if records[0].impl != "cpu":
        return None, f"decoding from pages has no kernel here: {records[0].refused.get('cpu', records[0].impl)}"
    trouble = trouble_with_pages(model, dense)
    return (None, trouble) if trouble else (LayerCache(), "")


def trouble_with_pages(model: Any, dense: Candidate) -> str:
    """Why a model cannot use a `PagedCache`; "" if it can."""
    try:
        same = _same_logits(model, Recipe.uniform(model, DENSE, dense.settings, cache=LayerCache()))
    except (ValueError, TypeError, AttributeError) as error:
        return f"the model cannot use a PagedCache: {error}"
    return "" if same else "the model's logits are others with a PagedCache"


@torch.no_grad()
def _same_logits(model: Any, recipe: Recipe) -> bool:
    """Whether a few tokens, a prompt and one more, give the logits they give at once without a cache."""
    ids = torch.arange(1, 6, device=model.device)[None]
    expected: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1]
    with apply(model, recipe):
        cache = recipe.make_cache(model)
        model(input_ids=ids[:, :-1], past_key_values=cache)
        found: Tensor = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1]
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


__all__ = [
    "CacheCandidate", "combined", "exact_cache", "find_cache_candidates", "trouble_with_pages",
]  # fmt: skip
