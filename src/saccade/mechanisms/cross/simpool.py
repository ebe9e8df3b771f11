"""SimPool: the mean of the tokens attends to the tokens, and their values are averaged by a power mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.ops import attend
from saccade.types import Kind

FLOOR = 1e-6
"""Added to the values before the power, so that its gradient stays finite."""


@register(
    "simpool",
    Kind.LAYER,
    summary="Pools tokens by attention from their mean, with a generalised mean of the values.",
    papers=("Keep It SimPool: Who Said Supervised Transformers Suffer from Attention Deficit?",),
    year=2023,
    code="billpsomas/simpool",
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        (
            "The minimum that makes values positive is taken per image, as in the paper; the authors' code takes it "
            "over the whole batch, which ties images together."
        ),
        "The authors' optional learned offset after the power mean is left out; it is not in the paper.",
    ),
    example={"channels": 12, "heads": 2, "gamma": 1.25},
)
class SimPool(Layer):
    """u = mean(X), a = softmax(W_q u (W_k LN(X))^T / sqrt(d)), out = (a (V - min V)^gamma)^(1 / gamma), V = LN(X).

    Args:
        channels: C.
        heads: Heads that attend on their own; the paper uses 1.
        gamma: Exponent of the power mean; 1.25 for transformers and 2 for convolutional networks in the paper. None is
            the plain weighted mean of V, without the shift.
        bias: Whether W_q and W_k have a bias.
    """

    def __init__(self, channels: int, heads: int = 1, gamma: float | None = 1.25, *, bias: bool = False) -> None:
        super().__init__()
        require(heads >= 1 and channels % heads == 0, "heads", heads, f"a divisor of channels={channels}")
        require(gamma is None or gamma > 0, "gamma", gamma, "None or a number above 0")
        self.channels, self.heads, self.gamma = channels, heads, gamma
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(channels, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Pool all tokens to one vector.

        Args:
            x: Tokens `[B, N, C]`, or a feature map `[B, C, *grid]` with two or more grid axes.

        Returns:
            `[B, C]`.

        Raises:
            ValueError: If the shape or the number of channels is wrong, or there are no tokens.
        """
        require(x.ndim >= 3, "x.shape", tuple(x.shape), "[B, N, C] or [B, C, *grid]")
        tokens = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)
        require(tokens.shape[2] == self.channels, "x.shape", tuple(x.shape), f"{self.channels} channels")
        require(tokens.shape[1] > 0, "x.shape", tuple(x.shape), "at least 1 token")
        value = self.norm(tokens)
        q = self._split(self.to_q(tokens.mean(1, keepdim=True)))
        k = self._split(self.to_k(value))
        if self.gamma is None:
            return attend(q, k, self._split(value)).flatten(1)
        positive = value - value.amin((1, 2), keepdim=True) + FLOOR
        pooled = attend(q, k, self._split(positive**self.gamma))
        return (pooled ** (1 / self.gamma)).flatten(1)

    def _split(self, x: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, heads, N, C / heads]`."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    @classmethod
    def sample_inputs(
        cls, batch: int, generator: torch.Generator, dtype: torch.dtype, device: Any
    ) -> tuple[Tensor, ...]:
        """Nine tokens of 12 channels."""
        return (torch.randn(batch, 9, 12, generator=generator, dtype=dtype, device=device),)
