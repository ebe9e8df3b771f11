"""VOLO's outlook attention: a pixel's own features say how its neighbours' values are mixed, and are handed back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import check_map, on_channels
from saccade.types import Kind, Pattern


@register(
    "outlook",
    Kind.LAYER,
    summary="Weights between all pixels of a small window come linearly from its centre; windows overlap and add up.",
    papers=("VOLO: Vision Outlooker for Visual Recognition",),
    year=2021,
    code="sail-sg/volo",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=("The attention alone, without dropout. Kernels are odd and padded by half, as in all of VOLO.",),
    example={"dim": 16, "heads": 2, "kernel": 3, "stride": 2},
)
class Outlook(Layer):
    """y_p = sum over windows w, and places a of w at pixel p, of sum over b of A_w[a, b] V[pixel of b], projected.

    A_w = softmax over b of (W x_w / sqrt(D)), one row for each of the kernel^2 places a: no queries, no keys. x_w is
    the feature at the window's centre, with a stride the average over stride x stride pixels. Places b beyond the map
    have value 0 and take part in the softmax.

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        kernel: Side of a window in pixels, odd.
        stride: Pixels from one window to the next, at most `kernel`.
        qkv_bias: Bias of the value projection.
    """

    def __init__(self, dim: int, heads: int = 6, kernel: int = 3, stride: int = 2, qkv_bias: bool = False) -> None:
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(kernel >= 1 and kernel % 2 == 1, "kernel", kernel, "an odd number of pixels")
        require(1 <= stride <= kernel, "stride", stride, f"at least 1 and at most kernel={kernel}")
        self.dim, self.heads, self.kernel, self.stride = dim, heads, kernel, stride
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.weights = nn.Linear(dim, kernel**4 * heads)
        self.projection = nn.Linear(dim, dim)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape, any height and width."""
        (x,) = inputs
        check_map(x, self.dim)
        places, window = self.kernel**2, {"padding": self.kernel // 2, "stride": self.stride}
        v = nn.functional.unfold(on_channels(self.value, x), self.kernel, **window)  # [B, C k^2, windows]
        v = v.unflatten(1, (self.heads, -1, places)).permute(0, 1, 4, 3, 2)
        centres = nn.functional.avg_pool2d(x, self.stride, ceil_mode=True)
        scores = self.weights(centres.flatten(2).mT).unflatten(2, (self.heads, places, places)).transpose(1, 2)
        mixed = (scores * (self.dim // self.heads) ** -0.5).softmax(-1) @ v  # [B, H, windows, k^2, D]
        mixed = mixed.permute(0, 1, 4, 3, 2).flatten(1, 3)
        out = nn.functional.fold(mixed, (x.shape[2], x.shape[3]), self.kernel, **window)
        return on_channels(self.projection, out)

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 5 x 6 map of 16 channels."""
        return (torch.randn(batch, 16, 5, 6, generator=generator).to(device, dtype),)
