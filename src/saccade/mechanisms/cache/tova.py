"""TOVA: keep the tokens that the newest token attends to most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._votes import window_votes
from saccade.mechanisms.cache.base import CachePolicy, Step, best
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern


@register(
    "tova",
    Kind.CACHE_POLICY,
    summary="Evicts the tokens that the newest token attends to least, in all heads of a layer alike.",
    other_papers=("Transformers are Multi-State RNNs",),
    year=2024,
    code="schwartz-lab-NLP/TOVA",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"evicting"}),
    deviations=(
        (
            "Keys keep the rotation of their place in the text, where the paper's code can also number the kept "
            "tokens anew."
        ),
        (
            "Several tokens in one call are attended densely and evicted from once, by the last of them, as the "
            "authors' code does with a prompt: chunks and single tokens drop earlier, and so differ from a whole "
            "prompt unless the budget is full."
        ),
        "The newest token's scores are computed once to attend and once to choose.",
    ),
    example={"tokens": 16},
    exact=lambda n: {"tokens": n},
    ladder=lambda n: tuple({"tokens": max(n // part, 1)} for part in (16, 8, 4, 2)),
    at_budget=lambda b: {"tokens": b.count},
)
@dataclass(frozen=True)
class TOVA(CachePolicy):
    """Token Omission Via Attention: after each call keep the `tokens` with the largest `sum_h A_h[newest, j]`.

    The softmax weights of the newest query are averaged over all query heads of the layer, so that all its heads keep
    the same tokens; the newest token has no privilege. Ties go to the earlier token.

    Args:
        tokens: Kept, per layer.
    """

    tokens: int = 512

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1 token")

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:
        """The tokens that the last query attends to most."""
        if len(store) <= self.tokens:
            return None
        weights = window_votes(q, store, step.scale, store.seen - 1, store.seen)
        if weights is None:
            return None
        weights = weights.sum(1, keepdim=True).expand_as(weights)
        return best(weights.masked_fill(~store.present, -torch.inf), self.tokens)
