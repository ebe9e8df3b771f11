"""TidalDecode: a selection layer finds the tokens worth reading, the layers after it read those and no others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._derived import highest
from saccade.mechanisms.cache.base import CachePolicy, Step
from saccade.mechanisms.cache.reading import score_stored
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern, TokenIndex


@register(
    "tidal_decode",
    Kind.CACHE_POLICY,
    summary="Decoding layers read only the tokens that an earlier selection layer scored highest.",
    papers=("TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",),
    year=2024,
    code="DerrickYLJ/TidalDecode",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"chunks", "gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"selecting"}),
    deviations=(
        (
            "The cache correction, which now and then recomputes keys and values of tokens decoded sparsely, is "
            "left out: it reruns the model, which a cache policy cannot."
        ),
        "A call with several tokens counts as prefill and is dense; only single tokens are sparse.",
        "A selection layer scores its keys once to select and once to attend; the authors' kernel does both in one.",
    ),
    example={"tokens": 8, "first_selection": 1, "reselection": 3},
    exact=lambda n: {"tokens": n},
    ladder=lambda n: tuple({"tokens": max(n // part, 1)} for part in (32, 16, 8, 4, 2)),
    at_budget=lambda b: (
        None if b.layers < 4 else {"tokens": b.count, "first_selection": 2, "reselection": max(3, b.layers * 13 // 32)}
    ),
)
@dataclass(frozen=True)
class TidalDecode(CachePolicy):
    """Position persistent sparse attention. Nothing is evicted; fewer bytes are read.

    Layers before `first_selection` attend fully. A selection layer attends fully and picks, per query head, the
    `tokens` slots with the largest q k^T, which travel in `Step.picked`. Every other layer attends to what was picked
    last. Build the layers with `CachedAttention.stack`, which shares the `Step`.

    Args:
        tokens: Tokens that a sparse layer reads per query head.
        first_selection: The first layer that selects; counted from 0.
        reselection: A later layer that selects anew, or None.
        shared: Whether all heads read one list, of the slots with the most softmax weight over all heads, instead of
            one for each query head, the authors' rule. A head's own list serves the same head of the next layers, which
            may look elsewhere; needs the same tokens in all heads.
    """

    tokens: int = 256
    first_selection: int = 2
    reselection: int | None = 13
    shared: bool = False

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1 token")
        require(self.first_selection >= 0, "first_selection", self.first_selection, "a layer, at least 0")
        require(
            self.reselection is None or self.reselection > self.first_selection,
            "reselection", self.reselection, f"None or a layer after first_selection={self.first_selection}",
        )  # fmt: skip

    def read(self, q: Tensor, store: KVStore, step: Step) -> TokenIndex | None:
        """All in full and selection layers; elsewhere what the last selection layer picked.

        Args:
            q: `[B, H, M, D]`.
            store: The layer's past, these tokens included.
            step: Says which layer runs; a selection layer leaves its choice in `picked`.

        Returns:
            The slots to read, or None for all.

        Raises:
            ValueError: If no selection layer has run in this call, or its choice does not fit this layer's slots.
        """
        if q.shape[2] != 1 or step.layer < self.first_selection:
            return None
        if step.layer in (self.first_selection, self.reselection):
            step.picked = self.select(q, store, step.scale)
            return None
        if step.picked is None or step.picked.keys != len(store):
            raise ValueError(
                f"layer={step.layer}: no choice for {len(store)} slots, expected the selection layer "
                f"{self.first_selection} to run before it in the same call (see CachedAttention.stack)"
            )
        return step.picked

    def first_alike(self, layer: int) -> int:
        """The first that attends to all, that selects, or that reads what was selected."""
        if layer < self.first_selection:
            return 0
        selecting = (self.first_selection, self.reselection)
        if layer in selecting:
            return self.first_selection
        return next(x for x in range(self.first_selection, layer + 1) if x not in selecting)

    def select(self, q: Tensor, store: KVStore, scale: float | None = None) -> TokenIndex:
        """The slots with the largest q k^T for each query head, `[B, H or 1, 1, min(tokens, n)]`."""
        if len(store) == 0:
            raise ValueError(f"store={store!r}: expected at least one token")
        scores = score_stored(q, store, scale=scale)[:, :, 0]
        if self.shared:
            positions = store.positions
            same = bool((positions == positions[:, :1]).all())
            require(same, "keep", "other tokens in each head", "a policy that keeps the same in all, they share a list")
            scores = scores.softmax(-1).sum(1, keepdim=True).masked_fill(~store.present[:, :1], -torch.inf)
        return highest(scores, self.tokens, len(store))
