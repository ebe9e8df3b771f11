"""VSA: each head and window learns from where, and from how large an area, its keys and values are sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import Partition, attend_windows, check_map, on_channels, relative_index
from saccade.ops.checks import accumulation_dtype
from saccade.types import Kind, Pattern


@register(
    "vsa",
    Kind.LAYER,
    summary="Queries of a window attend to keys sampled from a window of learned place and size, one for each head.",
    papers=("VSA: Learning Varied-Size Window Attention in Vision Transformers",),
    year=2022,
    code="ViTAE-Transformer/ViTAE-VSA",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        "The attention alone: no norm, convolutional branch or positional convolution before it.",
        (
            "Any size of map: padded below and to the right, as in the authors' classification code (their detection "
            "code pads all around, and divides offsets by the number of windows of the other axis). Along an axis that "
            "one window holds, the window is that axis."
        ),
    ),
    example={"dim": 16, "heads": 2, "window": 3},
)
class VSA(Layer):
    """softmax(Q K'^T / sqrt(D) + B) V' inside each window, then a projection; B as in Swin, by place in the window.

    K' and V' are K and V sampled bilinearly at centre + (1 + s) * (place - centre) + o, for each place of the window,
    with scale s and offset o, both along each axis, from 1 x 1 convolutions of LeakyReLU(AvgPool(x)) over the window.
    An offset of 1 is half the map over the number of windows along the axis. Beyond the map K and V are 0, and take
    part in the softmax.

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        window: Side of a window in pixels.
        qkv_bias: Bias of the query, key and value projection.
    """

    def __init__(self, dim: int, heads: int = 8, window: int = 7, qkv_bias: bool = True) -> None:
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(window >= 1, "window", window, "at least 1 pixel")
        self.dim, self.heads, self.window = dim, heads, window
        self.offset = nn.Linear(dim, 2 * heads)
        self.scale = nn.Linear(dim, 2 * heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.projection = nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape, any height and width."""
        (x,) = inputs
        check_map(x, self.dim)
        cut = Partition.of(x, self.window)
        q, k, v = (self._pad(part, cut) for part in on_channels(self.qkv, x).chunk(3, 1))
        k, v = self._sample(k, v, self._places(self._pad(x, cut), cut))
        index = relative_index(cut.window, (self.window, self.window), x.device)
        bias = self.table[index].permute(2, 0, 1)[None]
        whole = Partition((q.shape[2], q.shape[3]), cut.window)
        out = whole.join(attend_windows(whole.split(torch.cat([q, k, v], 1)), self.heads, bias, None))
        return on_channels(self.projection, out[:, :, : x.shape[2], : x.shape[3]])

    @staticmethod
    def _pad(x: Tensor, cut: Partition) -> Tensor:
        """`[B, C, Y, X]` with zeros below and to the right, up to whole windows."""
        down, right = (-size % side for size, side in zip(cut.grid, cut.window, strict=True))
        return nn.functional.pad(x, (0, right, 0, down))

    def _places(self, x: Tensor, cut: Partition) -> Tensor:
        """Where every place of the padded map samples, for each head: pixels `[B, H, 2 (row, column), Y, X]`."""
        pooled = nn.functional.leaky_relu(nn.functional.avg_pool2d(x, cut.window))
        offsets, scales = (
            on_channels(layer, pooled)
            .unflatten(1, (self.heads, 2))
            .flip(2)  # x comes first in the authors' weights
            .to(accumulation_dtype(x.dtype))  # half precision does not tell pixels apart
            for layer in (self.offset, self.scale)
        )
        rows, columns = (self._axis(x, cut, axis, offsets[:, :, axis], scales[:, :, axis]) for axis in (0, 1))
        return torch.stack([rows, columns], 2)

    @staticmethod
    def _axis(x: Tensor, cut: Partition, axis: int, offset: Tensor, scale: Tensor) -> Tensor:
        """Pixels along one axis, `[B, H, Y, X]`, from `[B, H, windows down, windows right]`."""
        side, size = cut.window[axis], x.shape[2 + axis]
        place = torch.arange(size, device=x.device)
        inside = (place % side).to(scale.dtype) - (side - 1) / 2
        shape = (size, 1) if axis == 0 else (1, size)
        unit = (size - 1) / 2 / (cut.grid[axis] // side)
        offset, scale = (
            each.repeat_interleave(cut.window[0], 2).repeat_interleave(cut.window[1], 3) for each in (offset, scale)
        )
        return place.to(scale.dtype).view(shape) + inside.view(shape) * scale + offset * unit

    def _sample(self, k: Tensor, v: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, C, Y, X]` of each head at its places, by bilinear interpolation."""
        sizes = places.new_tensor(k.shape[2:]).sub(1).clamp(min=1)
        grid = places.flip(2).permute(0, 1, 3, 4, 2) / sizes.flip(0) * 2 - 1
        both = torch.cat([part.unflatten(1, (self.heads, -1)) for part in (k, v)], 2).flatten(0, 1).to(grid.dtype)
        sampled = nn.functional.grid_sample(both, grid.flatten(0, 1), padding_mode="zeros", align_corners=True)
        near_k, near_v = (part.flatten(1, 2) for part in sampled.unflatten(0, (-1, self.heads)).chunk(2, 2))
        return near_k.to(k.dtype), near_v.to(v.dtype)

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 6 x 7 map of 16 channels."""
        return (torch.randn(batch, 16, 6, 7, generator=generator).to(device, dtype),)
