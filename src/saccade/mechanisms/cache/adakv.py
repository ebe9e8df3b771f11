"""Ada-KV: heads compete for the tokens that are kept of a prompt, so that some keep many and some few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._votes import PROTOCOLS, PromptCompression
from saccade.mechanisms.cache.base import Step, best
from saccade.types import Kind, Pattern


@register(
    "adakv",
    Kind.CACHE_POLICY,
    summary="Evicts a prompt's tokens by SnapKV's votes, with one budget that all heads of a layer compete for.",
    other_papers=("Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",),
    year=2024,
    code="FFY0/AdaKV",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"evicting"}),
    deviations=(
        PROTOCOLS,
        (
            "Ada-SnapKV; the authors' other variant, on PyramidKV's budgets, their option to weight a head's votes by "
            "how much of them its own budget would hold, and their option to leave the first layers uniform are left "
            "out. Budgets are rounded per head, as in their code, so that a layer's sum may be off by up to "
            "1.5 tokens per head."
        ),
    ),
    example={"tokens": 16, "window": 4, "kernel": 3},
    exact=lambda n: {"tokens": n + 1, "window": min(n, 32)},
    ladder=lambda n: tuple({"tokens": max(n // part, 2), "window": max(n // part // 4, 1)} for part in (16, 8, 4, 2)),
    at_budget=lambda b: {"tokens": b.count, "window": min(32, b.count // 2)},
)
@dataclass(frozen=True)
class AdaKV(PromptCompression):
    """As `SnapKV`, question-aware or not, with as many tokens per head as it has among the best of all heads.

    With `c = tokens - window`, the `G c` highest votes of a layer's G key/value heads are marked; a head with a marks
    keeps its best `round((1 - floor) a + int(floor c))` tokens and the window. Heads are ragged, memory is freed.

    Args:
        tokens: Kept of a prompt per key/value head, on average over heads, the window included.
        window: Last tokens of the prompt, which vote and stay.
        kernel: Neighbours that votes are pooled over, odd; 1 for none.
        pooling: "mean", with zeros beyond the ends, or "max".
        prompt: Tokens of each sequence's prompt, padding not counted; None for all of the first call.
        floor: Share of the mean budget that each head has for sure, 0 to 1.
    """

    tokens: int = 1024
    window: int = 32
    kernel: int = 7
    pooling: Literal["mean", "max"] = "max"
    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.0 <= self.floor <= 1.0, "floor", self.floor, "a share, 0 to 1")

    def budgets(self, votes: Tensor, prompt: Tensor, step: Step) -> Tensor:  # noqa: ARG002
        """For each head, by its part of the layer's best, int64 `[B, G]`."""
        mean, heads = self.tokens - self.window, votes.shape[1]
        marked = best(votes.flatten(1), heads * mean).view_as(votes).sum(-1)
        return torch.round((1.0 - self.floor) * marked + int(self.floor * mean)).to(torch.int64)
