"""CSWin's layer: cross-shaped windows, and LePE, a depthwise convolution of the values inside every stripe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import Partition, attend_windows, check_map, on_channels
from saccade.types import Kind, Pattern


@register(
    "cswin_attention",
    Kind.LAYER,
    summary="Half of the heads attend within vertical stripes, half within horizontal ones; LePE gives them positions.",
    papers=("CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",),
    year=2021,
    code="microsoft/CSWin-Transformer",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N^1.5",
    deviations=(
        "The attention alone: no norm, MLP, dropout or merging. The selector `cswin` is its pattern.",
        (
            "Vertical stripes come first, as in the authors' code. Where the side does not divide, stripes lie in the "
            "middle as in their segmentation code, but what is padded is hidden instead of taking part in the softmax."
        ),
        "Their last stage, one window for all heads, is a stripe at least as wide as the map.",
        "N^1.5 is for square maps.",
    ),
    example={"dim": 32, "heads": 2, "stripe": 2},
)
class CSWinAttention(Layer):
    """softmax(Q K^T / sqrt(D)) V + LePE(V) inside each stripe, then a projection of both halves of the channels.

    The first half of the heads has stripes of full height, the second of full width. LePE is a 3 x 3 depthwise
    convolution that sees zeros past the border of the stripe.

    Args:
        dim: Channels C, in and out.
        heads: H, even; divides C.
        stripe: Width of a stripe in pixels; the authors take 1, 2, 7, 7 in the four stages of an image of 224.
        qkv_bias: Bias of the query, key and value projection.
    """

    def __init__(self, dim: int, heads: int = 8, stripe: int = 7, qkv_bias: bool = True) -> None:
        super().__init__()
        require(heads >= 2 and heads % 2 == 0 and dim % heads == 0, "heads", heads, f"an even divisor of dim={dim}")
        require(dim >= 2, "dim", dim, "at least 2 channels")
        require(stripe >= 1, "stripe", stripe, "at least 1 pixel")
        self.dim, self.heads, self.stripe = dim, heads, stripe
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.projection = nn.Linear(dim, dim)
        self.lepe = nn.ModuleList(nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2) for _ in range(2))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape, any height and width."""
        (x,) = inputs
        check_map(x, self.dim)
        parts = on_channels(self.qkv, x).unflatten(1, (3, 2, -1)).unbind(2)  # vertical, horizontal
        halves = []
        for axis, (part, lepe) in enumerate(zip(parts, self.lepe, strict=True)):
            partition = self._stripes(x, thin=1 - axis)
            windows = partition.split(part.flatten(1, 2))
            out = attend_windows(windows, self.heads // 2, None, partition.segments(len(x), x.device))
            halves.append(partition.join(out + lepe(windows.chunk(3, 1)[2])))
        return on_channels(self.projection, torch.cat(halves, 1))

    def _stripes(self, x: Tensor, thin: int) -> Partition:
        """Stripes of the whole map along one axis and of width `stripe` along the axis `thin`."""
        size = x.shape[2 + thin]
        width = min(self.stripe, size)
        before = -size % width // 2
        if thin == 0:
            return Partition((size, x.shape[3]), (width, x.shape[3]), before=(before, 0))
        return Partition((x.shape[2], size), (x.shape[2], width), before=(0, before))

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 6 x 5 map of 32 channels."""
        return (torch.randn(batch, 32, 6, 5, generator=generator).to(device, dtype),)
