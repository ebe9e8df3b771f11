"""Twins-SVT: locally-grouped attention inside windows, and global attention to one summary of each window."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import Partition, attend_windows, check_map, on_channels
from saccade.ops import attend
from saccade.types import Kind, Pattern


@register(
    "twins",
    Kind.LAYER,
    summary="Attention inside windows (LSA), or of all pixels to a strided convolution of the map (GSA), in turns.",
    papers=("Twins: Revisiting the Design of Spatial Attention in Vision Transformers",),
    year=2021,
    code="Meituan-AutoML/Twins",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N^2",
    deviations=(
        (
            "The attention alone: no norm before it, MLP or dropout. PCPVT, which is GSA with conditional position "
            "encoding, is not built beyond it."
        ),
        "LSA hides padding, where the side does not divide; the authors' detection code shows its keys to the softmax.",
        "Work is N^2 / size^2 for GSA, N for LSA.",
    ),
    example={"dim": 16, "heads": 2, "size": 2, "form": "global"},
)
class Twins(Layer):
    """LSA: softmax(Q K^T / sqrt(D)) V inside windows. GSA: K, V = projections of LayerNorm(Conv(x)), stride = kernel.

    Rows and columns that do not fill a last window of GSA are left out of its keys, as by the authors' convolution.

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        size: Side of a window in pixels; the authors take 7 for LSA, and 8, 4, 2, 1 in the stages for GSA.
        form: "local" (LSA) or "global" (GSA).
        qkv_bias: Bias of the query, key and value projections.
    """

    def __init__(
        self, dim: int, heads: int = 8, size: int = 7, form: Literal["local", "global"] = "local",
        qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(size >= 1, "size", size, "at least 1 pixel")
        require(form in ("local", "global"), "form", form, "'local' or 'global'")
        self.dim, self.heads, self.size, self.form = dim, heads, size, form
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key_value = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.projection = nn.Linear(dim, dim)
        if form == "global" and size > 1:
            self.reduce = nn.Conv2d(dim, dim, size, stride=size)
            self.norm = nn.LayerNorm(dim)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape; GSA needs both to be at least `size`."""
        (x,) = inputs
        check_map(x, self.dim)
        out = self._local(x) if self.form == "local" else self._global(x)
        return on_channels(self.projection, out)

    def _local(self, x: Tensor) -> Tensor:
        partition = Partition.of(x, self.size)
        qkv = torch.cat([on_channels(self.query, x), on_channels(self.key_value, x)], 1)
        windows = attend_windows(partition.split(qkv), self.heads, None, partition.segments(len(x), x.device))
        return partition.join(windows)

    def _global(self, x: Tensor) -> Tensor:
        summary = x
        if self.size > 1:
            if min(x.shape[2:]) < self.size:
                raise ValueError(f"x of shape {tuple(x.shape)}: expected height and width of at least size={self.size}")
            summary = on_channels(self.norm, self.reduce(x))
        k, v = (self._split(part) for part in on_channels(self.key_value, summary).chunk(2, 1))
        out = attend(self._split(on_channels(self.query, x)), k, v)
        return out.mT.flatten(1, 2).unflatten(2, x.shape[2:])

    def _split(self, x: Tensor) -> Tensor:
        """`[B, C, y, x]` to `[B, H, y * x, D]`."""
        return x.flatten(2).unflatten(1, (self.heads, -1)).mT

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 6 x 5 map of 16 channels."""
        return (torch.randn(batch, 16, 6, 5, generator=generator).to(device, dtype),)
