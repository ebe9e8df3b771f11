"""PyramidKV: prompts compressed by votes, generously in the first layers and ever more towards the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._votes import PROTOCOLS, PromptCompression
from saccade.mechanisms.cache.base import Step
from saccade.types import Kind, Pattern


@register(
    "pyramidkv",
    Kind.CACHE_POLICY,
    summary="Evicts a prompt's tokens by SnapKV's votes, with a budget that falls linearly from layer to layer.",
    other_papers=("PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",),
    year=2024,
    code="Zefan-Cai/PyramidKV",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"evicting"}),
    deviations=(
        PROTOCOLS,
        (
            "Budgets follow the authors' code, which rounds down between layers, so that the sum may fall short of or "
            "exceed `layers * tokens` by up to one token per layer and step, and which is uniform for prompts below "
            "2 (tokens - window) tokens. Its optional merging of evicted tokens is left out."
        ),
    ),
    example={"tokens": 16, "window": 4, "kernel": 3},
    exact=lambda n: {"tokens": n + 1, "window": min(n, 8)},
    ladder=lambda n: tuple({"tokens": max(n // part, 2), "window": max(n // part // 4, 1)} for part in (16, 8, 4, 2)),
    at_budget=lambda b: {"tokens": b.count, "window": min(8, b.count // 2)},
)
@dataclass(frozen=True)
class PyramidKV(PromptCompression):
    """As `SnapKV`, question-aware or not, with `m - layer * ((m - l) // (layers - 1))` tokens beside the window.

    Here `l = (tokens - window) // beta` are the last layer's and `m = 2 (tokens - window) - l` the first one's, so
    that the mean is that of `SnapKV`; where the prompt has fewer than m tokens beside its window, m is these and
    l makes up for it. Prompts of fewer than `2 (tokens - window)` tokens get the same budget in all layers.

    Args:
        tokens: Kept of a prompt per key/value head, on average over layers, the window included.
        window: Last tokens of the prompt, which vote and stay.
        kernel: Neighbours that votes are pooled over, odd; 1 for none.
        pooling: "mean", with zeros beyond the ends, or "max".
        prompt: Tokens of each sequence's prompt, padding not counted; None for all of the first call.
        beta: How steep the pyramid is: the last layer keeps one in `beta` tokens of the mean.
    """

    window: int = 8
    kernel: int = 7
    pooling: Literal["mean", "max"] = "max"
    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 1, "beta", self.beta, "at least 1")

    def budgets(self, votes: Tensor, prompt: Tensor, step: Step) -> Tensor:  # noqa: ARG002
        """The same for all heads of a layer.

        Args:
            votes: `[B, G, n]`.
            prompt: int64 `[B]`, tokens of the prompts.
            step: Says which layer of how many runs.

        Returns:
            int64 `[B, 1]`.

        Raises:
            ValueError: If `step` knows fewer layers than the one that runs.
        """
        if step.layer >= step.layers:
            raise ValueError(
                f"step.layers={step.layers}: expected more than layer={step.layer} (see CachedAttention.stack)"
            )
        mean = self.tokens - self.window
        first = (prompt - self.window).clamp(max=2 * mean - mean // self.beta)
        fall = (2 * first - 2 * mean) // max(1, step.layers - 1)
        budget = first - step.layer * fall
        uniform = (prompt < 2 * mean) | torch.tensor(step.layers == 1, device=prompt.device)
        return torch.where(uniform, mean, budget)[:, None]
