"""Window attention with relative position bias: Swin's shifted windows, and MaxViT's block and grid attention."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import Partition, attend_windows, check_map, on_channels, relative_index
from saccade.types import Kind, Pattern


@register(
    "swin_attention",
    Kind.LAYER,
    summary="Multi-head attention inside (shifted or spread-out) windows, with a learned bias per relative position.",
    papers=(
        "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        "MaxViT: Multi-Axis Vision Transformer",
    ),
    year=2021,
    code="microsoft/Swin-Transformer",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        "The attention alone: no norm, MLP, dropout, patch merging or MBConv. `swin` and `maxvit` are its patterns.",
        (
            "Padding, where the side does not divide, is hidden; Swin's detection code lets it take part in the "
            "softmax, MaxViT refuses such maps."
        ),
        (
            "Along an axis that one window holds, the window is that axis and is not shifted (Swin: both axes, if "
            "either is held); the bias table stays that of `window`. MaxViT's resizing of the table is not built."
        ),
    ),
    example={"dim": 16, "heads": 2, "window": 4, "shift": 2},
)
class SwinAttention(Layer):
    """softmax(Q K^T / sqrt(D) + B) V inside each window, then a projection; B[i, j] = table[place of i - place of j].

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        window: Side of a window in pixels; with form "grid", that of a group of pixels.
        shift: Rows and columns of the cyclic shift: 0 in even layers, window // 2 in odd ones of Swin.
        form: "block": a window is made of neighbours; "grid": of pixels spread evenly over the map, unshifted.
        qkv_bias: Bias of the query, key and value projection.
    """

    def __init__(
        self, dim: int, heads: int = 8, window: int = 7, shift: int = 0, form: Literal["block", "grid"] = "block",
        qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(window >= 1, "window", window, "at least 1 pixel")
        require(form in ("block", "grid"), "form", form, "'block' or 'grid'")
        require(0 <= shift < window, "shift", shift, f"at least 0 and less than window={window}")
        require(shift == 0 or form == "block", "shift", shift, "0 with form='grid'")
        self.dim, self.heads, self.window, self.shift, self.form = dim, heads, window, shift, form
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.projection = nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape, any height and width."""
        (x,) = inputs
        check_map(x, self.dim)
        partition = Partition.of(x, self.window, self.shift, dilated=self.form == "grid")
        windows = partition.split(on_channels(self.qkv, x))
        index = relative_index(partition.window, (self.window, self.window), x.device)
        bias = self.table[index].permute(2, 0, 1)[None]
        out = attend_windows(windows, self.heads, bias, partition.segments(len(x), x.device))
        return on_channels(self.projection, partition.join(out))

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 6 x 7 map of 16 channels."""
        return (torch.randn(batch, 16, 6, 7, generator=generator).to(device, dtype),)
