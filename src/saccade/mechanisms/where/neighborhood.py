"""Neighbourhood attention in 1-D, 2-D and 3-D: sliding, strided (GNA) and dilated (DiNA) windows, as NATTEN defines."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Selector, require
from saccade.mechanisms.where._grids import Line, grid_of, grid_pattern, is_per_axis, per_axis
from saccade.mechanisms.where._tiles import TileCount, flat_tiles, grid_tiles, visits
from saccade.types import BlockLayout, Boxes, Geometry, Kind, TokenIndex
from saccade.types.grids import candidates, grid_layout

TILE = 16
"""Neighbouring queries whose boxes the C++ engine computes together."""

BOX_COST = 1.3
"""Pairs of a block product that take as long as a pair of such a tile: it shares what it reads among fewer queries."""


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
            "Runs on the block and gather engines; the C++ engine tiles the axes of the grid as FNA does. FNA's GPU "
            "kernels are not built. Window, stride, dilation and borders are NATTEN's."
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
        block: Block size of the layout, in tokens, where a layout is cheaper than boxes or lists of neighbours.
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
                require(is_per_axis(value, 1), name, value, "an int of at least 1, or one to three of them")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def axes(self, grid: tuple[int, ...], rows_causal: bool = False) -> tuple[Axis, ...]:
        """The windows on this grid, checked; `rows_causal` is `geometry.causal`."""
        flat = not rows_causal or len(grid) == 1
        require(flat, "geometry.causal", rows_causal, f"False on grid={grid}; the setting `causal` is per axis")
        axes = []
        settings = (
            per_axis(getattr(self, name), name, grid) for name in ("kernel_size", "stride", "dilation", "causal")
        )
        for size, kernel, stride, dilation, causal in zip(grid, *settings, strict=True):
            window = max(1, round(kernel * size / dilation)) if isinstance(kernel, float) else kernel
            require(window * dilation <= size, "kernel_size", kernel, f"kernel_size * dilation={dilation} <= {size}")
            require(stride <= window, "stride", stride, f"at most kernel_size={window}")
            axes.append(Axis(size, window, stride, dilation, bool(causal) or rows_causal))
        return tuple(axes)

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout | TokenIndex | Boxes:
        """Neighbours of every token: the same for each call on the same grid, so built once."""
        grid = grid_of(q.shape[2], k.shape[2], geometry)
        return _pattern(self, grid, geometry.causal, geometry.prefix, geometry.suffix, str(q.device))

    def tiles(
        self, grid: tuple[int, ...], q_tile: int | tuple[int, ...], kv_tile: int | tuple[int, ...], *,
        dynamic: bool = False,
    ) -> TileCount:  # fmt: skip
        """What a kernel that works in tiles can gain on this grid: GNA's simulator (NATTENSim).

        It counts the tiles of keys that the busiest tile of queries visits, against all of them. Each phase of a
        dilation is tiled on its own, as NATTEN does.

        Args:
            grid: Sizes of one to three axes.
            q_tile: Sizes of a tile of queries, one for each axis; an int is a tile of so many consecutive tokens.
            kv_tile: That of a tile of keys, in the same form.
            dynamic: Tiles of keys begin where a tile of queries first needs one, instead of at multiples of their size.

        Returns:
            The counts; their `speedup` is the upper bound, their `bound` what counting operations promises.

        Raises:
            ValueError: If the tiles are of two forms, of another number of axes or empty, or an int with a dilation or
                with `dynamic`.
        """
        axes = self.axes(grid)
        for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
            sizes = tile if isinstance(tile, tuple) else (tile,)
            require(min(sizes) >= 1, name, tile, "at least 1 token along every axis")
            fits = isinstance(tile, int) or len(tile) == len(grid)
            require(fits, name, tile, f"an int, or one size for each of the {len(grid)} axes of grid={grid}")
        lines = [Line(*axis_window(axis, "cpu"), axis.dilation, axis.kernel) for axis in axes]
        if isinstance(q_tile, tuple) and isinstance(kv_tile, tuple):
            return grid_tiles(lines, q_tile, kv_tile, dynamic=dynamic)
        require(isinstance(q_tile, int) and isinstance(kv_tile, int), "kv_tile", kv_tile, f"as q_tile={q_tile}")
        require(not dynamic, "dynamic", dynamic, "False with tiles of consecutive tokens")
        undilated = all(axis.dilation == 1 for axis in axes)
        require(undilated, "dilation", self.dilation, "1 with tiles of consecutive tokens")
        return flat_tiles(lines, cast("int", q_tile), cast("int", kv_tile))


def useful_strides(size: int, kernel_size: int, q_tile: int, kv_tile: int) -> dict[int, int]:
    """Strides along one axis worth trying: those with which fewer tiles are visited than with any smaller one.

    Args:
        size: Of the axis, in tokens.
        kernel_size: Window, in tokens.
        q_tile: Queries of a tile along this axis.
        kv_tile: Keys of a tile along this axis.

    Returns:
        From such a stride to the tiles of keys that a tile of queries visits along this axis.
    """
    useful: dict[int, int] = {}
    for stride in range(1, kernel_size + 1):
        line = Line(*axis_window(Axis(size, kernel_size, stride, 1, causal=False), "cpu"), 1, kernel_size)
        count = visits(line, q_tile, kv_tile, dynamic=False)
        if not useful or count < min(useful.values()):
            useful[stride] = count
    return useful


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
def _pattern(
    mechanism: Neighborhood, grid: tuple[int, ...], rows_causal: bool, prefix: int, suffix: int, device: str
) -> BlockLayout | TokenIndex | Boxes:
    """The windows of all axes as a pattern, the cheapest; text tokens see everything, which boxes cannot hold."""
    axes, block = mechanism.axes(grid, rows_causal), mechanism.block
    lines = [Line(*axis_window(axis, device), axis.dilation, axis.kernel) for axis in axes]
    if prefix + suffix or torch.device(device).type != "cpu":
        return grid_pattern(lines, prefix, suffix, block)
    boxes, blocks = Boxes.of(lines, block), candidates(lines, 0, 0, block)
    if len(blocks.indices) * block * block < BOX_COST * boxes.queries * _rows_of_a_tile(axes):
        return grid_layout(lines, 0, 0, blocks)
    return boxes


def _rows_of_a_tile(axes: tuple[Axis, ...]) -> int:
    """Keys that a compact tile of `TILE` queries sees together."""
    shapes = itertools.product(*([2**n for n in range(TILE.bit_length())] for _ in axes))
    return min(
        math.prod(axis.kernel + side - 1 for axis, side in zip(axes, shape, strict=True))
        for shape in shapes
        if math.prod(shape) == TILE
    )
