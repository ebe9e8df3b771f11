"""HiLo attention of LITv2: some heads attend inside small windows, the others to the average of every window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import Partition, attend_windows, check_map, on_channels
from saccade.ops import attend
from saccade.types import Kind, Pattern


@register(
    "hilo",
    Kind.LAYER,
    summary="High-frequency heads attend inside windows, low-frequency heads to keys averaged over each window.",
    papers=("Fast Vision Transformers with HiLo Attention",),
    year=2022,
    code="ziplab/LITv2",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N^2",
    deviations=(
        "The attention alone: no norm, convolutional MLP or patch embedding.",
        (
            "Where the side does not divide, padding is hidden from the softmax and left out of the averages; the "
            "authors' detection code counts its zeros in both."
        ),
        "Work is N^2 / window^2 for the low-frequency heads, N for the others.",
    ),
    example={"dim": 16, "heads": 4, "window": 2},
)
class HiLo(Layer):
    """Hi-Fi: softmax(Q K^T / sqrt(D)) V inside windows, then a projection. Lo-Fi: K, V from AvgPool(x), likewise.

    Each group has projections of its own; their outputs are concatenated, high frequencies first.

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        window: Side of a window in pixels; 1 makes every head plain attention over all pixels, as the authors do.
        alpha: Fraction of the heads, rounded down, that are low-frequency.
        qkv_bias: Bias of the query, key and value projections.
    """

    def __init__(
        self, dim: int, heads: int = 8, window: int = 2, alpha: float = 0.5, qkv_bias: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(window >= 1, "window", window, "at least 1 pixel")
        require(0 <= alpha <= 1, "alpha", alpha, "a fraction of the heads in [0, 1]")
        self.dim, self.window = dim, window
        self.low = heads if window == 1 else int(heads * alpha)
        self.high = heads - self.low
        low, high = self.low * dim // heads, self.high * dim // heads
        if self.low:
            self.low_query = nn.Linear(dim, low, bias=qkv_bias)
            self.low_key_value = nn.Linear(dim, 2 * low, bias=qkv_bias)
            self.low_projection = nn.Linear(low, low)
        if self.high:
            self.high_qkv = nn.Linear(dim, 3 * high, bias=qkv_bias)
            self.high_projection = nn.Linear(high, high)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape, any height and width."""
        (x,) = inputs
        check_map(x, self.dim)
        parts = [self._high_frequencies(x)] if self.high else []
        parts += [self._low_frequencies(x)] if self.low else []
        return torch.cat(parts, 1)

    def _high_frequencies(self, x: Tensor) -> Tensor:
        partition = Partition.of(x, self.window)
        windows = partition.split(on_channels(self.high_qkv, x))
        out = attend_windows(windows, self.high, None, partition.segments(len(x), x.device))
        return on_channels(self.high_projection, partition.join(out))

    def _low_frequencies(self, x: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(x, self.window, ceil_mode=True, count_include_pad=False)
        q = self._split(on_channels(self.low_query, x))
        k, v = (self._split(part) for part in on_channels(self.low_key_value, means).chunk(2, 1))
        out = attend(q, k, v).mT.flatten(1, 2).unflatten(2, x.shape[2:])
        return on_channels(self.low_projection, out)

    def _split(self, x: Tensor) -> Tensor:
        """`[B, C, y, x]` to `[B, low heads, y * x, D]`."""
        return x.flatten(2).unflatten(1, (self.low, -1)).mT

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 5 x 6 map of 16 channels."""
        return (torch.randn(batch, 16, 5, 6, generator=generator).to(device, dtype),)
