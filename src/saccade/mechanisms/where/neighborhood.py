"""Neighbourhood attention in 1-D, 2-D and 3-D: sliding, strided (GNA) and dilated (DiNA) windows, as NATTEN defines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Selector, require
from saccade.types import BlockLayout, Geometry, Kind, TokenIndex

GATHER_COST = 8
"""Pairs of a block product that take as long as one gathered pair: 6 to 8 measured with the eager engines on a CPU."""


class Axis(NamedTuple):
    """One axis of the grid and its window."""

    size: int
    kernel: int
    stride: int
    dilation: int
    causal: bool


@register(
    "neighborhood",
    Kind.SELECTOR,
    summary="Each token of a 1-D, 2-D or 3-D grid sees the window around it; with stride and dilation.",
    papers=(
        "Dilated Neighborhood Attention Transformer",
        "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
        "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    ),
    other_papers=("Neighborhood Attention Transformer",),
    year=2022,
    code="SHI-Labs/NATTEN",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="kernel_size = 1.0 (the whole of every axis), dilation = 1",
    complexity="N",
    deviations=(
        (
            "Runs on the block and gather engines: FNA's tiling over the axes of the grid, its kernels and its "
            "speed-up simulator are not built. Window, stride, dilation and borders are NATTEN's."
        ),
        "kernel_size may be a fraction of the axis, and 1 is allowed (NATTEN asks for at least 2).",
        "Text before and after the grid sees and is seen by all, where NATTEN only lets it be seen.",
        "geometry.causal is defined on 1-D grids only; the order of rows is not a neighbourhood. See `causal`.",
    ),
    example={"kernel_size": 5},
    exact=lambda n: {"kernel_size": 1.0},  # noqa: ARG005
    ladder=lambda n: tuple(
        {"kernel_size": size, "block": min(64, max(n // 16, 1))} for size in (0.03125, 0.0625, 0.125, 0.25)
    ),
)
@dataclass(frozen=True)
class Neighborhood(Selector):
    """Query at x sees the `kernel_size` tokens nearest to its stride group's leader, per axis, `dilation` apart.

    Per axis, among the tokens of equal x % dilation, n of them, with x standing for x // dilation:
    leader l = min(x // stride * stride + stride // 2, n - 1); window start = l - kernel_size // 2, moved inside
    [0, n - kernel_size]. Causal: l = min(x // stride * stride + stride - 1, n - 1), window l - kernel_size + 1 .. x.
    Without `geometry.grid` all tokens lie on one axis.

    Args:
        kernel_size: Window in tokens, for all axes or each; a float in (0, 1] is that fraction of each axis.
        stride: Queries that share a window, for all axes or each; at most kernel_size.
        dilation: Gap between neighbours, for all axes or each; kernel_size * dilation must fit the axis.
        causal: Hide what lies ahead along all axes or each (for example time only); text sees everything still.
        block: Block size of the layout, in tokens, where a layout is cheaper than lists of neighbours.
    """

    kernel_size: int | float | tuple[int, ...] = 7
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    block: int = 64

    def __post_init__(self) -> None:
        kernel = self.kernel_size
        if isinstance(kernel, float):
            require(0 < kernel <= 1, "kernel_size", kernel, "tokens, or a float: a fraction of the axis in (0, 1]")
        for name in ("kernel_size", "stride", "dilation"):
            value = getattr(self, name)
            if not isinstance(value, float) or name != "kernel_size":
                sizes = value if isinstance(value, tuple) else (value,)
                good = 1 <= len(sizes) <= 3 and all(isinstance(x, int) and x >= 1 for x in sizes)
                require(good, name, value, "an int of at least 1, or one to three of them")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def _axes(self, tokens: int, geometry: Geometry) -> tuple[Axis, ...]:
        """The windows on this grid, checked."""
        grid = (tokens,) if geometry.grid is None else geometry.grid
        inside = math.prod(grid) + geometry.prefix + geometry.suffix
        expected = f"{inside}, the tokens of grid={grid} with prefix={geometry.prefix}, suffix={geometry.suffix}"
        require(inside == tokens, "tokens", tokens, expected)
        flat = not geometry.causal or len(grid) == 1
        require(flat, "geometry.causal", geometry.causal, f"False on grid={grid}; the setting `causal` is per axis")
        axes = []
        settings = (_per_axis(self, name, grid) for name in ("kernel_size", "stride", "dilation", "causal"))
        for size, kernel, stride, dilation, causal in zip(grid, *settings, strict=True):
            window = max(1, round(kernel * size / dilation)) if isinstance(kernel, float) else kernel
            require(window * dilation <= size, "kernel_size", kernel, f"kernel_size * dilation={dilation} <= {size}")
            require(stride <= window, "stride", stride, f"at most kernel_size={window}")
            axes.append(Axis(size, window, stride, dilation, bool(causal) or geometry.causal))
        return tuple(axes)

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout | TokenIndex:
        """Neighbours of every token: the same for each call on the same grid, so built once."""
        require(q.shape[2] == k.shape[2], "queries", q.shape[2], f"{k.shape[2]}, as many as keys")
        axes = self._axes(k.shape[2], geometry)
        return _pattern(axes, geometry.prefix, geometry.suffix, self.block, str(q.device))


def _per_axis(mechanism: Neighborhood, name: str, grid: tuple[int, ...]) -> tuple:
    """A setting for each axis of the grid."""
    value = getattr(mechanism, name)
    values = value if isinstance(value, tuple) else (value,) * len(grid)
    require(len(values) == len(grid), name, value, f"one for each of the {len(grid)} axes of grid={grid}")
    return values


def axis_window(axis: Axis, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """First and last neighbour along one axis, int64 `[size]` each; those between are `dilation` apart."""
    x = torch.arange(axis.size, device=device)
    phase, x = x % axis.dilation, x // axis.dilation
    count = (axis.size - phase + axis.dilation - 1) // axis.dilation
    group = x // axis.stride * axis.stride
    if axis.causal:
        leader = torch.minimum(group + axis.stride - 1, count - 1)
        start, stop = (leader - axis.kernel + 1).clamp(min=0), x
    else:
        leader = torch.minimum(group + axis.stride // 2, count - 1)
        start = torch.minimum((leader - axis.kernel // 2).clamp(min=0), count - axis.kernel)
        stop = start + axis.kernel - 1
    return start * axis.dilation + phase, stop * axis.dilation + phase


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # kept tensors may serve a backward pass later
def _pattern(axes: tuple[Axis, ...], prefix: int, suffix: int, block: int, device: str) -> BlockLayout | TokenIndex:
    """The cheaper form: block products waste the rest of each block, lists of neighbours have to be gathered.

    Text tokens see everything, which lists of equal length cannot hold; with them it is always blocks.
    """
    windows = [axis_window(axis, device) for axis in axes]
    candidates = _candidates(axes, windows, prefix, suffix, block)
    grid_tokens = math.prod(axis.size for axis in axes)
    gathered = grid_tokens * math.prod(axis.kernel for axis in axes)
    if prefix + suffix == 0 and len(candidates.indices) * block * block > GATHER_COST * gathered:
        return TokenIndex(_neighbours(axes, windows)[None, None], grid_tokens, grid_tokens)
    return _layout(axes, windows, prefix, suffix, candidates)


def _neighbours(axes: tuple[Axis, ...], windows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Grid positions of every token's neighbours, int64 `[tokens, product of kernels]`; -1 = hidden by causality."""
    index = torch.zeros(1, 1, dtype=torch.int64, device=windows[0][0].device)
    for axis, (first, last) in zip(axes, windows, strict=True):
        along = first[:, None] + axis.dilation * torch.arange(axis.kernel, device=first.device)
        along = torch.where(along <= last[:, None], along, -1)
        both = index[:, None, :, None] * axis.size + along[None, :, None, :]
        hidden = (index < 0)[:, None, :, None] | (along < 0)[None, :, None, :]
        index = both.masked_fill(hidden, -1).flatten(2).flatten(0, 1)
    return index


def _candidates(
    axes: tuple[Axis, ...], windows: list[tuple[Tensor, Tensor]], prefix: int, suffix: int, block: int
) -> BlockLayout:
    """Blocks that hold a grid pair: the runs of keys that the stretches of each query block span, row by row."""
    width, (first, last) = axes[-1].size, windows[-1]
    tokens = math.prod(axis.size for axis in axes)
    total, device = prefix + tokens + suffix, first.device
    query = torch.arange(tokens, device=device)
    line, query_block = query // width, (query + prefix) // block
    stretch = torch.unique_consecutive(query_block * tokens + line, return_inverse=True)[1]
    count = int(stretch[-1]) + 1
    low = torch.full((count,), width, device=device).scatter_reduce_(0, stretch, first[query % width], "amin")
    high = torch.zeros(count, dtype=torch.int64, device=device)
    high.scatter_reduce_(0, stretch, last[query % width], "amax")
    start = torch.full((count,), tokens, device=device).scatter_reduce_(0, stretch, query, "amin")
    rows = _neighbours(axes[:-1], windows[:-1])[start // width] if len(axes) > 1 else torch.zeros_like(start)[:, None]
    from_block = (rows * width + low[:, None] + prefix) // block
    to_block = (rows * width + high[:, None] + prefix) // block
    columns = torch.where(rows < 0, 0, to_block - from_block + 1).flatten()
    key_blocks = -(-total // block)
    base = (query_block[start][:, None] * key_blocks + from_block).flatten().repeat_interleave(columns)
    step = torch.arange(len(base), device=device) - (columns.cumsum(0) - columns).repeat_interleave(columns)
    code = torch.unique(base + step)
    per_row = torch.bincount(code // key_blocks, minlength=-(-total // block))
    return BlockLayout(
        indptr=torch.nn.functional.pad(per_row.cumsum(0), (1, 0)),
        indices=(code % key_blocks).int(),
        kinds=torch.full((len(code),), -1, dtype=torch.int32, device=device),
        bits=torch.empty(0, -(-block * block // 8), dtype=torch.uint8, device=device),
        batch=1, heads=1, queries=total, keys=total, block=(block, block),
    )  # fmt: skip


def _layout(
    axes: tuple[Axis, ...], windows: list[tuple[Tensor, Tensor]], prefix: int, suffix: int, candidates: BlockLayout
) -> BlockLayout:
    """The exact pairs of the candidate blocks, and text that sees and is seen by all."""
    tokens = math.prod(axis.size for axis in axes)
    total, block, device = candidates.queries, candidates.block, candidates.device

    def near(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i, j = i - prefix, j - prefix
        kept = (i >= 0) & (i < tokens) & (j >= 0) & (j < tokens)
        i, j = i.clamp(0, tokens - 1), j.clamp(0, tokens - 1)
        for axis, (first, last) in zip(reversed(axes), reversed(windows), strict=True):
            x, y = i % axis.size, j % axis.size
            kept &= (y >= first[x]) & (y <= last[x])
            if axis.dilation > 1:
                kept &= y % axis.dilation == x % axis.dilation
            i, j = i // axis.size, j // axis.size
        return kept

    layout = BlockLayout.from_mask_mod(near, total, total, block=block, candidates=candidates)
    if prefix + suffix == 0:
        return layout
    text = torch.cat([torch.arange(prefix, device=device), torch.arange(total - suffix, total, device=device)])
    return layout | BlockLayout.tokens(
        total, total, key_tokens=text, query_tokens=text, block=block, device=device
    )  # fmt: skip
