"""Triplet attention: three gates, each seeing the feature map along another axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.types import Kind


@register(
    "triplet",
    Kind.LAYER,
    summary="Gates over (channel, width), (height, channel) and (height, width), averaged.",
    papers=("Rotate to Attend: Convolutional Triplet Attention Module",),
    year=2020,
    code="landskape-ai/triplet-attention",
    supports=frozenset({"backward"}),
    complexity="N",
    example={"kernel": 3},
)
class Triplet(Layer):
    """out = mean over axes a of x * sigmoid(BN(conv(Z_a(x)))), Z_a(x) = [max over a, mean over a].

    Args:
        kernel: Side of the convolution, odd; 7 in the paper.
        spatial: Whether the (height, width) gate, pooled over channels, is the third; else there are two.
    """

    def __init__(self, kernel: int = 7, *, spatial: bool = True) -> None:
        super().__init__()
        require(kernel >= 1 and kernel % 2 == 1, "kernel", kernel, "an odd number of at least 1")
        self.height = _gate(kernel)
        self.width = _gate(kernel)
        self.spatial = _gate(kernel) if spatial else None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Gate a feature map.

        Args:
            x: `[B, C, height, width]`.

        Returns:
            The same shape.

        Raises:
            ValueError: If it is not a feature map with two grid axes.
        """
        require(x.ndim == 4 and min(x.shape[1:]) > 0, "x.shape", tuple(x.shape), "[B, C, height, width], not empty")
        over_height = self.height(_squeeze(x, 2)).transpose(1, 2)  # [B, 1, C, W] -> [B, C, 1, W]
        over_width = self.width(_squeeze(x, 3).transpose(2, 3)).transpose(1, 3)  # [B, 1, H, C] -> [B, C, H, 1]
        if self.spatial is None:
            return x * (over_height + over_width) / 2
        return x * (over_height + over_width + self.spatial(_squeeze(x, 1))) / 3

    @classmethod
    def sample_inputs(
        cls, batch: int, generator: torch.Generator, dtype: torch.dtype, device: Any
    ) -> tuple[Tensor, ...]:
        """A 5 x 4 map of 3 channels."""
        return (torch.randn(batch, 3, 5, 4, generator=generator, dtype=dtype, device=device),)


def _squeeze(x: Tensor, axis: int) -> Tensor:
    """Maximum and mean over one axis, as two channels before the two axes that remain, in their order."""
    return torch.stack([x.amax(axis), x.mean(axis)], 1)


def _gate(kernel: int) -> nn.Sequential:
    """From `[B, 2, p, q]` to a gate `[B, 1, p, q]` in (0, 1)."""
    convolution = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(1, eps=1e-5, momentum=0.01), nn.Sigmoid())
