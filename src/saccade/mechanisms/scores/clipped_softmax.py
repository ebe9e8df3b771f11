"""Clipped softmax: softmax stretched past [0, 1] and clipped, so that exact zeros need no huge scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import ALL_PATTERNS, Score, require
from saccade.types import Kind


@register(
    "clipped_softmax",
    Kind.SCORE,
    summary="Softmax stretched to [gamma, zeta] and clipped to [0, 1]: a head can attend to nothing without outliers.",
    papers=("Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",),
    year=2023,
    code="Qualcomm-AI-research/outlier-free-transformers",
    patterns=ALL_PATTERNS,
    supports=frozenset({"backward", "gqa", "segments", "streaming"}),
    training_free=False,
    exact_when="gamma = 0 and zeta = 1",
    complexity="N^2",
    deviations=(
        (
            "With alpha and no length, T in gamma = -alpha / T is the number of keys the row sees, so that whole, "
            "packed and step-by-step calls agree; the authors use the fixed maximal sequence length, which is `length`."
        ),
        "The paper's second proposal, gated attention, is another mechanism and not part of this one.",
    ),
    example={"gamma": -0.03, "zeta": 1.03},
    exact=lambda n: {"gamma": 0.0, "zeta": 1.0},  # noqa: ARG005
)
@dataclass(frozen=True)
class ClippedSoftmax(Score):
    """weights = clip((zeta - gamma) softmax(scores) + gamma, 0, 1). Rows need not sum to 1.

    Args:
        gamma: Lower end of the stretch, at most 0; softmax weights below -gamma / (zeta - gamma) become exactly 0.
        zeta: Upper end of the stretch, at least 1.
        alpha: If given, gamma is -alpha / T instead of `gamma` (the paper finds 2 to 4 good).
        length: T of `alpha`, in tokens; None means the number of keys the row sees.
    """

    gamma: float = -0.03
    zeta: float = 1.0
    alpha: float | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        require(self.gamma <= 0, "gamma", self.gamma, "at most 0")
        require(self.zeta >= 1, "zeta", self.zeta, "at least 1")
        require(self.alpha is None or self.alpha >= 0, "alpha", self.alpha, "at least 0, or None")
        require(self.length is None or self.length >= 1, "length", self.length, "at least 1 token, or None")
        require(self.length is None or self.alpha is not None, "length", self.length, "None unless alpha is given")

    def normalise(self, scores: Tensor, mask: Tensor) -> Tensor:
        """See the class; masked pairs and rows that see nothing get exactly 0."""
        hidden = ~mask
        softmax = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        gamma = self._gamma(scores, mask)
        return ((self.zeta - gamma) * softmax + gamma).clamp(0.0, 1.0).masked_fill(hidden, 0.0)

    def _gamma(self, scores: Tensor, mask: Tensor) -> float | Tensor:
        """Gamma of every row: a number, or `[B or 1, H or 1, m or 1, 1]` where it follows the row's length."""
        if self.alpha is None:
            return self.gamma
        if self.length is not None:
            return -self.alpha / self.length
        seen = mask.expand(*mask.shape[:-1], scores.shape[-1]).sum(-1, keepdim=True).clamp(min=1)
        return -self.alpha / seen.to(scores.dtype)
