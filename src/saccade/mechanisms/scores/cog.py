"""Cog attention: signed weights, so that a head can subtract a value as well as copy it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import ALL_PATTERNS, Score
from saccade.types import Kind


@register(
    "cog",
    Kind.SCORE,
    summary="Softmax of the score's size times the score's sign: negative attention weights.",
    papers=("More Expressive Attention with Negative Weights",),
    year=2024,
    code="trestad/CogAttn",
    patterns=ALL_PATTERNS,
    supports=frozenset({"backward", "gqa", "segments", "streaming"}),
    training_free=False,
    complexity="N^2",
    deviations=(
        (
            "The authors keep plain softmax in the first and the last layer of a model; which layers use this one is "
            "the caller's choice."
        ),
    ),
)
@dataclass(frozen=True)
class Cog(Score):
    """weights = sign(s) exp(|s|) / sum |sign(s) exp(|s|)|, in the stable form sign(s) softmax(|s|).

    The sizes of a row's weights sum to 1, the weights themselves need not. A score of exactly 0 has weight 0 but, as in
    the authors' code, counts exp(0) in the sum.
    """

    def normalise(self, scores: Tensor, mask: Tensor) -> Tensor:
        """See the class; masked pairs and rows that see nothing get exactly 0."""
        hidden = ~mask
        sizes = scores.abs().masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        return (scores.sign() * sizes).masked_fill(hidden, 0.0)
