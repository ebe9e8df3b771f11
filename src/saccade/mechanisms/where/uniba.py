"""Inf-DiT's unidirectional block attention: blocks of an image see themselves and those above and to the left."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._grids import Line, grid_of, grid_pattern, is_per_axis, per_axis
from saccade.types import BlockLayout, Geometry, Kind, Pattern, TokenIndex


@register(
    "uniba",
    Kind.SELECTOR,
    summary="A block of the grid sees itself and the next blocks above, to the left and to the upper left.",
    papers=("Inf-DiT: Upsampling Any-Resolution Image with Memory-Efficient Diffusion Transformer",),
    year=2024,
    code="THUDM/Inf-DiT",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=False,
    exact_when="size >= every axis of the grid",
    complexity="N",
    deviations=(
        (
            "The pattern alone, for any q, k, v; with the embeddings that tell keys of the four blocks apart it is the "
            "layer `uniba_attention`, which can also work row by row."
        ),
        (
            "Blocks at the border have fewer neighbours; the authors put the block itself in their place, so that it "
            "is seen up to four times."
        ),
        "Grids of one to three axes, also of sides that `size` does not divide. Text sees and is seen by all.",
    ),
    example={"size": 8, "block": 8},
    exact=lambda n: {"size": max(n, 1)},
)
@dataclass(frozen=True)
class UniBA(Selector):
    """Query at x in block b = x // size sees the places y with b - 1 <= y // size <= b along every axis.

    Blocks may thus be computed in raster order with only one row of them, and one block, in memory, layer by layer;
    information still travels across the image as layers are stacked.

    Args:
        size: Side of a block in tokens, for all axes or each; the authors take 128 pixels.
        direction: "lt": see what is left and above; "rb": see what is right and below.
        block: Block size of the layout, in tokens, where a layout is cheaper than lists of neighbours.
    """

    size: int | tuple[int, ...] = 32
    direction: Literal["lt", "rb"] = "lt"
    block: int = 64

    def __post_init__(self) -> None:
        require(is_per_axis(self.size, 1), "size", self.size, "an int of at least 1, or one to three of them")
        require(self.direction in ("lt", "rb"), "direction", self.direction, "'lt' or 'rb'")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout | TokenIndex:
        """The blocks of this grid and those before them."""
        grid = grid_of(q.shape[2], k.shape[2], geometry)
        sizes = per_axis(self.size, "size", grid)
        forward = self.direction == "rb"
        return _pattern(grid, sizes, forward, geometry.prefix, geometry.suffix, self.block, str(q.device))


def neighbour_line(size: int, side: int, forward: bool, device: torch.device | str) -> Line:
    """Along one axis, the block of each place and the one before it, or behind it if `forward`."""
    start = torch.arange(size, device=device) // side * side
    first = start if forward else (start - side).clamp(min=0)
    last = (start + (2 if forward else 1) * side - 1).clamp(max=size - 1)
    return Line(first, last, 1, min(2 * side, size))


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # kept tensors may serve a backward pass later
def _pattern(
    grid: tuple[int, ...], sizes: tuple[int, ...], forward: bool, prefix: int, suffix: int, block: int, device: str
) -> BlockLayout | TokenIndex:
    """The pattern of this grid; built once."""
    lines = [neighbour_line(size, side, forward, device) for size, side in zip(grid, sizes, strict=True)]
    return grid_pattern(lines, prefix, suffix, block)
