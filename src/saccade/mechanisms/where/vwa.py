"""VWA: queries of a local window attend to a context several times its size, folded to the cost of the window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import Partition, attend_windows, check_map, on_channels
from saccade.types import Kind, Pattern


@register(
    "vwa",
    Kind.LAYER,
    summary="Windows attend to a context `ratio` times their side, whose pixels are folded into channels first.",
    papers=("Multi-Scale Representations by Varying Window Attention for Semantic Segmentation",),
    year=2024,
    code="yan-hao-tian/VW",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        (
            "One attention of one ratio. The decoder that concatenates those of ratios 2, 4 and 8 with the map and its "
            "mean is not built, nor are the batch norms after its convolutions."
        ),
        (
            "`window` is a setting (the authors' decoder makes 8 x 8 windows of any map). Where it does not divide a "
            "side, the map is padded with zeros below and to the right, which are keys as the paper's own padding is."
        ),
    ),
    example={"dim": 16, "heads": 2, "window": 2, "ratio": 2},
)
class VWA(Layer):
    """softmax(Q K^T / sqrt(D)) V from each window to its context, then a projection.

    - The context of a window is the square around it of `ratio` times its side. Where it sticks out of the map, pixels
      of the same row or column further inside take the place of those missing (copy-shift padding), so that it holds
      each pixel once; only a map smaller than the context leaves zeros.
    - Before, a convolution over ratio x ratio pixels with stride 1 and ReLU (densely overlapping patch embedding)
      leaves C / ratio^2 channels. Then each ratio x ratio square of the context becomes one key of C channels.

    Hence there are as many keys as in the window itself, whatever the ratio.

    Args:
        dim: Channels C, in and out; a multiple of ratio^2.
        heads: H; divides C.
        window: Side P of a window in pixels.
        ratio: R: the context is R P x R P pixels.
    """

    def __init__(self, dim: int, heads: int = 8, window: int = 8, ratio: int = 2) -> None:
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(window >= 1, "window", window, "at least 1 pixel")
        require(
            ratio >= 1 and dim % ratio**2 == 0, "ratio", ratio, f"at least 1, and its square a divisor of dim={dim}"
        )
        self.dim, self.heads, self.window, self.ratio = dim, heads, window, ratio
        self.embed = nn.Conv2d(dim, dim // ratio**2, ratio)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.projection = nn.Linear(dim, dim)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape, any height and width."""
        (x,) = inputs
        check_map(x, self.dim)
        below, right = (-size % self.window for size in x.shape[2:])
        padded = nn.functional.pad(x, (0, right, 0, below))
        cut = Partition((padded.shape[2], padded.shape[3]), (self.window, self.window))
        q = cut.split(on_channels(self.query, padded))
        k_and_v = on_channels(self.key_value, self._contexts(padded))
        out = cut.join(attend_windows(torch.cat([q, k_and_v], 1), self.heads, None, None))
        return on_channels(self.projection, out[:, :, : x.shape[2], : x.shape[3]])

    def _contexts(self, x: Tensor) -> Tensor:
        """The folded context of each window, `[B * windows, C, P, P]`."""
        first, last = (self.ratio - 1) // 2, self.ratio // 2
        embedded = torch.relu(self.embed(nn.functional.pad(x, (first, last, first, last))))
        embedded = nn.functional.pad(embedded, (0, 1, 0, 1))  # what places outside the map read
        rows, columns = (context_places(size, self.window, self.ratio, x.device) for size in x.shape[2:])
        context = embedded[:, :, rows][..., columns]  # [B, C / R^2, windows down, R P, windows right, R P]
        squares = context.unflatten(5, (self.window, self.ratio)).unflatten(3, (self.window, self.ratio))
        return squares.permute(0, 2, 5, 4, 7, 1, 3, 6).flatten(3, 5).flatten(0, 2)

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 6 x 7 map of 16 channels."""
        return (torch.randn(batch, 16, 6, 7, generator=generator).to(device, dtype),)


def context_places(size: int, window: int, ratio: int, device: torch.device | str = "cpu") -> Tensor:
    """The pixels of each window's context along one axis, in order.

    Args:
        size: Pixels along the axis, a multiple of `window`.
        window: P.
        ratio: R.
        device: Where to put it.

    Returns:
        int64 `[size / P, R P]`; `size` stands for a zero.
    """
    context = ratio * window
    before = context - (ratio + 1) * window // 2  # the larger half where what surrounds a window is odd
    start = torch.arange(0, size, window, device=device) - before
    place = start[:, None] + torch.arange(context, device=device)
    spare = max(context - size, 0) // 2  # a smaller map lies in the middle of as much zeros as the context needs
    low, high = place + context - spare, place + max(size, context) - context - size - spare
    place = torch.where(place < 0, low, torch.where(place < size, place, high))
    return torch.where((place >= 0) & (place < size), place, size)
