"""Quest: pages of keys are bounded channel by channel, a query reads the pages whose bound is highest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._derived import (
    BOUNDS_FORM,
    StepSelection,
    bounds_name,
    page_bounds,
    per_query_head,
    scores,
)
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.forms import Forms
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern, TokenIndex


@register(
    "quest",
    Kind.CACHE_POLICY,
    summary="Decoding reads the pages whose keys could score highest, by the least and greatest of each channel.",
    other_papers=("Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",),
    year=2024,
    code="mit-han-lab/Quest",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"chunks", "gqa"}),
    training_free=True,
    exact_when="tokens >= N + page",
    complexity="N",
    effects=frozenset({"selecting"}),
    deviations=(
        (
            "The page being filled is always read, as the authors' kernels have it; in their evaluation code it "
            "competes with the others."
        ),
        "With grouped-query attention each query head has its own pages, as in the authors' evaluation code.",
        "A call with several tokens counts as prefill and is dense, as the authors have it; only single tokens select.",
        (
            "Bounds lie beside the store, 2 D numbers a page, and are kept between steps; where slots move (eviction, "
            "beams) they are made anew from all keys."
        ),
    ),
    example={"tokens": 12, "page": 4, "dense_layers": 1},
    exact=lambda n: {"tokens": n + 4, "page": 4, "dense_layers": 0},
    ladder=lambda n: tuple({"tokens": max(n // part, 6), "page": 2, "dense_layers": 0} for part in (16, 8, 4, 2)),
    at_budget=lambda b: {"tokens": b.count, "page": 16, "dense_layers": 2 if b.layers > 2 else 0},
)
@dataclass(frozen=True)
class Quest(StepSelection):
    """A query reads the pages with the highest bound on its scores. Nothing is evicted; fewer bytes are read.

    A page's bound is `sum_c max(q_c low_c, q_c high_c)` with the least and greatest number of each channel c among its
    keys. Per query head the page that is being filled and the `max(3, tokens // page) - 1` others with the highest
    bounds are read. A step costs the bounds, `2 / page` of all keys, and its pages.

    Args:
        tokens: Budget per query head.
        page: Tokens of a page; the paper has 16.
        dense_layers: First layers that read everything.
    """

    tokens: int = 1024
    page: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        require(self.page >= 1, "page", self.page, "at least 1 token")
        require(self.tokens >= self.page, "tokens", self.tokens, f"at least page={self.page}")
        require(self.dense_layers >= 0, "dense_layers", self.dense_layers, "at least 0 layers")

    def derives(self) -> Forms:
        """Bounds of pages."""
        return {bounds_name(self.page): BOUNDS_FORM}

    def select(self, q: Tensor, store: KVStore, step: Step) -> TokenIndex:
        """Slots of the best pages, `[B, H, 1, pages * page]`, -1 past a head's length."""
        low, high = page_bounds(store, self.page, step)
        step.choosing += low.nbytes + high.nbytes
        filled = torch.div(store.lengths + self.page - 1, self.page, rounding_mode="floor")
        bound = scores(q.clamp(min=0), high, filled) + scores(q.clamp(max=0), low, filled)
        last, lengths = (per_query_head(x, q)[..., None] for x in (filled - 1, store.lengths))
        bound.scatter_(2, last.clamp(min=0), torch.inf)
        count = min(max(3, self.tokens // self.page), low.shape[2])
        pages = bound.topk(count, dim=-1, sorted=False).indices.sort(-1).values
        slots = (pages[..., None] * self.page + torch.arange(self.page, device=q.device)).flatten(-2)
        return TokenIndex(slots.masked_fill(slots >= lengths, -1)[:, :, None], 1, len(store))
