"""Key norms: keys of small length attract attention, so those of large length go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.catalog import Budget, register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._keys import NORM, key_norms
from saccade.mechanisms.cache.base import CachePolicy, Step, best
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern


def _beside_whole_layers(budget: Budget) -> dict[str, int] | None:
    """Tokens of the other layers, so that all together hold the budget; None if the whole layers alone exceed it."""
    whole = 2 if budget.layers > 2 else 0
    part = (budget.part - whole / budget.layers) / (1 - whole / budget.layers)
    return None if part <= 0 else {"tokens": max(1, round(part * budget.tokens)), "whole_layers": whole}


@register(
    "key_norm",
    Kind.CACHE_POLICY,
    summary="Evicts the tokens whose keys have the largest L2 norm; needs no attention weights.",
    other_papers=("A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",),
    year=2024,
    code="alessiodevoto/l2compress",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"evicting"}),
    deviations=(
        (
            "A number of tokens stays, which is also where eviction begins; the authors' code keeps a share of what a "
            "layer holds once that is longer than a given length."
        ),
        (
            "Evicts after each call, with no privilege for new tokens: a prompt in chunks reads what earlier chunks "
            "left and so differs from one fed whole in what it computes, though not in which of the same keys stay."
        ),
    ),
    example={"tokens": 16, "whole_layers": 1},
    exact=lambda n: {"tokens": n},
    ladder=lambda n: tuple({"tokens": max(n // part, 1)} for part in (16, 8, 4, 2)),
    at_budget=_beside_whole_layers,
)
@dataclass(frozen=True)
class KeyNorm(CachePolicy):
    """After each call keep, per key/value head, the `tokens` with the smallest `||k_j||_2`; ties: the earlier token.

    A norm is kept with its token: a step reads its new keys alone.

    Args:
        tokens: Kept, per key/value head.
        whole_layers: First layers that keep everything, where norms say little.
    """

    tokens: int = 2048
    whole_layers: int = 2
    stats: ClassVar[tuple[str, ...]] = (NORM,)

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1 token")
        require(self.whole_layers >= 0, "whole_layers", self.whole_layers, "at least 0 layers")

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:  # noqa: ARG002
        """The shortest keys."""
        if len(store) <= self.tokens or step.layer < self.whole_layers:
            return None
        return best((-key_norms(store)).masked_fill(~store.present, -torch.inf), self.tokens)

    def first_alike(self, layer: int) -> int:
        """The first layer keeps everything as long as others do."""
        return 0 if layer < self.whole_layers else self.whole_layers
