"""FaSA: groups of channels attend to keys of their own reach: pooled ones, and windows averaged over the whole map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import check_map
from saccade.ops import attend
from saccade.types import Kind, Pattern


@register(
    "fasa",
    Kind.LAYER,
    summary="Channel groups attend to pooled keys, and to windows averaged over the map, near or dilated.",
    papers=("Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost",),
    year=2023,
    code="q2479036243/FaViT",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N^2",
    deviations=(
        "The attention alone: no norm, MLP, dropout or patch embedding.",
        (
            "Work is N window^2 + N (N / reduction^2), as in the authors' code; the paper's linear cost needs "
            "`reduction` to grow with the side of the map, as it does between their stages."
        ),
        (
            "Each channel is averaged over the windows. The authors' code lines up the channels of all windows, window "
            "after window, and averages runs as long as there are windows, so that each new channel mixes neighbouring "
            "ones of few windows; that is the setting `runs`."
        ),
        "Reflection at the far borders goes on where it is longer than the map; theirs refuses such maps.",
    ),
    example={"dim": 16, "heads": 1, "window": 3, "reduction": 2},
)
class FaSA(Layer):
    """Channels are cut 2 : 7 : 7 (1 : 7 with reduction 1) into groups, which attend apart; a projection joins them.

    The first group has one head, and as keys the map pooled by a convolution of side and stride `reduction`. Each other
    group has a dilation d, 1 and `reduction`. The map, after a separable convolution, is cut into squares of side
    d (window - 1) + 1; the window of every d-th place in a square is averaged over all squares, and its window^2 places
    are the keys of all queries. Values get a depthwise convolution of themselves added, for position.

    Args:
        dim: Channels C, in and out; a multiple of 16 (8 with reduction 1).
        heads: H of the groups with windows; divides their channels.
        window: Side M of a window, in places.
        reduction: Side of what is pooled into a key of the first group, and the dilation of the last.
        qkv_bias: Bias of the projections to queries, keys and values.
        runs: Average as the authors' code does, see the card.
    """

    def __init__(
        self, dim: int, heads: int = 8, window: int = 7, reduction: int = 8, qkv_bias: bool = False, runs: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        require(reduction >= 1, "reduction", reduction, "at least 1 place")
        shares = (2, 7, 7) if reduction > 1 else (1, 7)
        unit = dim // sum(shares)
        require(dim >= 1 and dim % sum(shares) == 0, "dim", dim, f"a multiple of {sum(shares)}")
        require(heads >= 1 and 7 * unit % heads == 0, "heads", heads, f"a divisor of a group's {7 * unit} channels")
        require(window >= 1, "window", window, "at least 1 place")
        self.dim, self.heads, self.window, self.reduction, self.runs = dim, heads, window, reduction, runs
        self.pooled, self.depth = shares[0] * unit, 7 * unit // heads
        self.dilations = (1, reduction)[: len(shares) - 1]
        local = dim - self.pooled
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.pool = nn.Conv2d(self.pooled, self.pooled, reduction, reduction)
        self.norm = nn.LayerNorm(self.pooled)
        self.pooled_key_value = nn.Linear(self.pooled, 2 * self.pooled, bias=qkv_bias)
        self.pooled_position = _depthwise(self.pooled)
        self.mix = nn.Sequential(_depthwise(local), nn.Conv2d(local, local, 1))
        self.fuse = nn.ModuleList(nn.Linear(self.depth, self.depth, bias=qkv_bias) for _ in self.dilations)
        self.key_value = nn.ModuleList(nn.Linear(self.depth, 2 * self.depth, bias=qkv_bias) for _ in self.dilations)
        self.position = nn.ModuleList(_depthwise(7 * unit) for _ in self.dilations)
        self.projection = nn.Linear(dim, dim)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape, at least `reduction` high and wide."""
        (x,) = inputs
        check_map(x, self.dim)
        side = min(x.shape[2:])
        require(side >= self.reduction, "height, width", tuple(x.shape[2:]), f"at least reduction={self.reduction}")
        q = self.query(x.flatten(2).mT)
        parts = [self._pooled(q[..., : self.pooled], x[:, : self.pooled])]
        local = self.mix(x[:, self.pooled :]).chunk(len(self.dilations), 1)
        queries = q[..., self.pooled :].unflatten(2, (self.heads, -1)).transpose(1, 2).chunk(len(self.dilations), -1)
        parts += [self._window(number, *given) for number, given in enumerate(zip(queries, local, strict=True))]
        return self.projection(torch.cat(parts, -1)).mT.unflatten(2, x.shape[2:])

    def _pooled(self, q: Tensor, x: Tensor) -> Tensor:
        """Attention of the first group, to the pooled map: `[B, N, channels]` for q of that shape."""
        pooled = self.pool(x)
        k, v = self.pooled_key_value(self.norm(pooled.flatten(2).mT)).chunk(2, -1)
        v = v + self.pooled_position(v.mT.unflatten(2, pooled.shape[2:])).flatten(2).mT
        return attend(q[:, None], k[:, None], v[:, None])[:, 0]

    def _window(self, number: int, q: Tensor, x: Tensor) -> Tensor:
        """Attention of a later group, q `[B, H, N, D]`, to its window averaged over the map: `[B, N, H * D]`."""
        cut = windows_of(x, self.window, self.dilations[number]).unflatten(1, (self.heads, self.depth))
        if self.runs:
            ordered = cut.permute(0, 1, 4, 3, 2).flatten(3)  # [B, H, window^2, windows * D]
            keys = ordered.unflatten(3, (self.depth, -1)).mean(4)
        else:
            keys = cut.mean(3).mT  # [B, H, window^2, D]
        k, v = self.key_value[number](self.fuse[number](keys)).chunk(2, -1)
        around = self.position[number](v.mT.flatten(1, 2).unflatten(2, (self.window, self.window)))
        v = v + around.flatten(2).unflatten(1, (self.heads, self.depth)).mT
        return attend(q, k, v).transpose(1, 2).flatten(2)

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 6 x 7 map of 16 channels."""
        return (torch.randn(batch, 16, 6, 7, generator=generator).to(device, dtype),)


def _depthwise(channels: int) -> nn.Conv2d:
    """A 3 x 3 convolution of each channel."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


def windows_of(x: Tensor, window: int, dilation: int) -> Tensor:
    """The dilated windows that stand side by side on a map, which goes on in the mirror at its far borders.

    Args:
        x: `[B, C, height, width]`.
        window: Places along a side of a window.
        dilation: Gap between these places; a window spans dilation * (window - 1) + 1 of the map.

    Returns:
        `[B, C, windows, window^2]`.
    """
    span = dilation * (window - 1) + 1
    for axis in (2, 3):
        place = torch.arange(-(-x.shape[axis] // span) * span, device=x.device)
        last = x.shape[axis] - 1
        mirrored = last - (place % max(2 * last, 1) - last).abs()
        x = x.index_select(axis, mirrored.view(-1, span)[:, ::dilation].flatten())
    return x.unflatten(3, (-1, window)).unflatten(2, (-1, window)).transpose(3, 4).flatten(4).flatten(2, 3)
