"""H2O: keep the heavy hitters, the tokens that have received the most attention so far, and the recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache.base import CachePolicy, Step, best, received_attention
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern


@register(
    "h2o",
    Kind.CACHE_POLICY,
    summary="Evicts all but the recent tokens and those with the highest accumulated attention.",
    other_papers=("H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",),
    year=2023,
    code="FMInference/H2O",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="heavy + recent >= N",
    complexity="N",
    effects=frozenset({"evicting"}),
    deviations=(
        (
            "Grouped-query attention, which the authors expand away, shares one list per key/value head: the attention "
            "of its query heads is summed. The authors sum over the batch too; here each sequence has its own list."
        ),
        (
            "Prefill is dense and evicts afterwards, as the authors' code does; a prompt fed in chunks evicts after "
            "each chunk and so differs from one fed whole, unless the budget is full."
        ),
        (
            "Follows the variant that really drops tokens: heavy + recent tokens rest in the cache and a step also "
            "sees its own token. Prefill computes its scores twice, once to attend and once to account."
        ),
    ),
    example={"heavy": 8, "recent": 8},
    exact=lambda n: {"heavy": n // 2, "recent": n - n // 2},
    ladder=lambda n: tuple({"heavy": max(n // part, 1), "recent": max(n // part, 1)} for part in (32, 16, 8, 4)),
    at_budget=lambda b: {"heavy": b.count - b.count // 2, "recent": b.count // 2},
)
@dataclass(frozen=True)
class H2O(CachePolicy):
    """After each call keep, per key/value head, the `recent` last tokens and of the rest the `heavy` best.

    The best are those with the largest sum over all past queries of softmax weights, `sum_i A[i, j]`, counted while
    the token was in the cache; ties go to the earlier token. The paper halves its budget: `heavy == recent`.

    Args:
        heavy: Heavy hitters kept, in tokens.
        recent: Last tokens kept, in tokens.
    """

    heavy: int = 512
    recent: int = 512
    stats: ClassVar[tuple[str, ...]] = ("attention",)
    needs_lse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.heavy >= 0, "heavy", self.heavy, "at least 0 tokens")
        require(self.recent >= 0, "recent", self.recent, "at least 0 tokens")
        require(self.heavy + self.recent >= 1, "heavy + recent", self.heavy + self.recent, "at least 1 token")

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:
        """Heavy hitters and recent tokens."""
        received = store.stat("attention") + received_attention(q, store, step)
        store.set_stat("attention", received)
        if len(store) <= self.heavy + self.recent:
            return None
        recent = store.positions >= store.seen[:, None, None] - self.recent
        return recent | best(received.masked_fill(recent | ~store.present, -torch.inf), self.heavy)
