"""Cutting grids into windows: for selectors as patterns, for layers as batches of small feature maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from saccade.mechanisms.where._grids import Line, head_patterns
from saccade.ops import attend
from saccade.types import BlockLayout, TokenIndex


@dataclass(frozen=True)
class Cut:
    """How one axis is cut: place x sees its own window [s, s + window), every `step`-th place, and a halo around it.

    s = floor((x - shift) / window) * window + shift; windows end at the borders of the axis.

    Args:
        size: Places along the axis.
        window: Places of a window.
        shift: Where a window begins; with a `step` it must be 0.
        step: Gap between the places that see each other.
        halo: Places on both sides of the window that it sees, too; with a `step` it must be 0.
    """

    size: int
    window: int
    shift: int = 0
    step: int = 1
    halo: int = 0

    def line(self, device: torch.device | str) -> Line:
        """The windows of all places."""
        x = torch.arange(self.size, device=device)
        start = (x - self.shift).div(self.window, rounding_mode="floor") * self.window + self.shift
        stop = (start + self.window + self.halo).clamp(max=self.size)
        first = (start - self.halo).clamp(min=0) if self.step == 1 else start + (x - start) % self.step
        last = first + (stop - 1 - first) // self.step * self.step
        return Line(first, last, self.step, int((last - first).max()) // self.step + 1)


def cyclic_cut(size: int, window: int, shift: int) -> Cut:
    """Swin's cut: windows of at most the axis, and no shift where one window holds it all."""
    return Cut(size, size) if size <= window else Cut(size, window, shift)


def grid_cut(size: int, count: int) -> Cut:
    """At most `count` places spread over the whole axis see each other: those of equal x % ceil(size / count)."""
    return Cut(size, size, step=-(-size // count))


def window_pattern(
    cuts: tuple[Cut, ...], prefix: int, suffix: int, block: int, device: str
) -> BlockLayout | TokenIndex:
    """The pattern of one cut for each axis, the same for all heads; built once."""
    return head_window_patterns(((1, cuts),), prefix, suffix, block, device)


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # kept tensors may serve a backward pass later
def head_window_patterns(
    parts: tuple[tuple[int, tuple[Cut, ...]], ...], prefix: int, suffix: int, block: int, device: str
) -> BlockLayout | TokenIndex:
    """The pattern of `(heads, cuts)` after `(heads, cuts)`; built once."""
    lines = [(heads, [cut.line(device) for cut in cuts]) for heads, cuts in parts]
    return head_patterns(lines, prefix, suffix, block)


@dataclass(frozen=True)
class Partition:
    """A feature map cut into windows of equal size, padded where the size does not divide.

    Args:
        grid: Height Y and width X of the map.
        window: Height and width of a window, at most those of the map.
        shift: Cyclic shift: rows and columns by which the map is rolled up and to the left before it is cut.
        dilated: A window holds places spread evenly over the whole map instead of neighbours.
        before: Of the rows and columns that are padded, those that are above and to the left.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    dilated: bool = False
    before: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, x: Tensor, side: int, shift: int = 0, *, dilated: bool = False) -> Partition:
        """Square windows of a map `[B, C, Y, X]`: along an axis that one of them holds, that axis, unshifted."""
        grid = (x.shape[2], x.shape[3])
        shifts = (0 if grid[0] <= side else shift, 0 if grid[1] <= side else shift)
        return cls(grid, (min(side, grid[0]), min(side, grid[1])), shifts, dilated)

    @property
    def counts(self) -> tuple[int, int]:
        """Windows along the height and the width."""
        return -(-self.grid[0] // self.window[0]), -(-self.grid[1] // self.window[1])

    def split(self, x: Tensor) -> Tensor:
        """`[B, C, Y, X]` to `[B * windows, C, *window]`; what was padded is 0."""
        (high, wide), (rows, columns) = self.window, self.counts
        (top, left), bottom, right = self.before, rows * high - self.grid[0], columns * wide - self.grid[1]
        x = nn.functional.pad(x, (left, right - left, top, bottom - top)) if bottom or right else x
        x = x.roll((-self.shift[0], -self.shift[1]), (2, 3)) if any(self.shift) else x
        if self.dilated:
            cut = x.unflatten(3, (wide, columns)).unflatten(2, (high, rows)).permute(0, 3, 5, 1, 2, 4)
        else:
            cut = x.unflatten(3, (columns, wide)).unflatten(2, (rows, high)).permute(0, 2, 4, 1, 3, 5)
        return cut.flatten(0, 2)

    def join(self, windows: Tensor) -> Tensor:
        """What `split` gave, or anything of its shape, back to `[B, C, Y, X]`."""
        cut = windows.unflatten(0, (-1, *self.counts))
        x = cut.permute(0, 3, 4, 1, 5, 2) if self.dilated else cut.permute(0, 3, 1, 4, 2, 5)
        x = x.flatten(4, 5).flatten(2, 3)
        x = x.roll(self.shift, (2, 3)) if any(self.shift) else x
        (top, left), (height, width) = self.before, self.grid
        return x[:, :, top : top + height, left : left + width]

    def segments(self, batch: int, device: torch.device) -> Tensor | None:
        """Which places of a window see each other: ids `[B * windows, places]`, padding -1; None where all do.

        The cyclic shift brings the first rows and columns to the end; they do not see the last ones, nor these them.
        """
        if not any(self.shift) and all(size % side == 0 for size, side in zip(self.grid, self.window, strict=True)):
            return None
        rows, columns = (torch.arange(size, device=device) for size in self.grid)
        ids = 1 + 2 * (rows < self.shift[0])[:, None].long() + (columns < self.shift[1])  # 0 is what `split` pads with
        return self.split(ids[None, None]).flatten(1).repeat(batch, 1) - 1


def attend_windows(windows: Tensor, heads: int, bias: Tensor | None, segments: Tensor | None) -> Tensor:
    """Softmax attention inside windows.

    Args:
        windows: Queries, keys and values `[W, 3 C, y, x]`.
        heads: H, a divisor of C.
        bias: Added to the scores, broadcasts to `[W, H, y * x, y * x]`, or None.
        segments: Ids `[W, y * x]` of what sees each other, or None.

    Returns:
        `[W, C, y, x]`.
    """
    q, k, v = (part.flatten(2).unflatten(1, (heads, -1)).mT for part in windows.chunk(3, 1))
    out = attend(q, k, v, bias=bias, q_segments=segments, kv_segments=segments)
    return out.mT.flatten(1, 2).unflatten(2, windows.shape[2:])


def on_channels(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer`, which maps the last axis, applied to the channels of a feature map `[B, C, Y, X]`."""
    return layer(x.movedim(1, -1)).movedim(-1, 1)


def relative_index(window: tuple[int, int], largest: tuple[int, int], device: torch.device) -> Tensor:
    """Where a bias table of all offsets query - key, rows (2 Y - 1) x (2 X - 1) for `largest` (Y, X), has each pair's.

    Args:
        window: Height and width of the window, at most `largest`.
        largest: Window that the table is made for.
        device: Where to put it.

    Returns:
        int64 `[y * x, y * x]`.
    """
    y, x = (torch.arange(size, device=device) for size in window)
    rows = (y[:, None, None, None] - y[:, None]) + largest[0] - 1
    columns = (x[:, None, None] - x) + largest[1] - 1
    return (rows * (2 * largest[1] - 1) + columns).reshape(math.prod(window), math.prod(window))


def check_map(x: Tensor, dim: int) -> None:
    """Refuse what is no feature map of `dim` channels."""
    if x.ndim != 4 or x.shape[1] != dim or 0 in x.shape[2:]:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected a feature map [B, {dim}, height, width]")
