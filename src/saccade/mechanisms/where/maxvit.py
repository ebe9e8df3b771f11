"""MaxViT: block attention inside windows, and grid attention among places spread over the whole map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._grids import grid_of, is_per_axis, per_axis
from saccade.mechanisms.where._windows import cyclic_cut, grid_cut, window_pattern
from saccade.types import BlockLayout, Geometry, Kind, Pattern, TokenIndex


@register(
    "maxvit",
    Kind.SELECTOR,
    summary="Tokens of a grid see their own window, or those spread evenly over the whole grid; layers take turns.",
    papers=("MaxViT: Multi-Axis Vision Transformer",),
    year=2022,
    code="google-research/maxvit",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=False,
    exact_when="size >= every axis of the grid",
    complexity="N",
    deviations=(
        "The pattern alone, for any q, k, v; with relative position bias it is the layer `swin_attention`. No MBConv.",
        (
            "Grids whose sides `size` does not divide work: the last windows are smaller, and grid attention steps by "
            "ceil(side / size). The authors refuse them."
        ),
        "Grids of one to three axes. Text before and after the grid sees and is seen by all.",
    ),
    example={"size": 8, "form": "grid", "block": 8},
    exact=lambda n: {"size": max(n, 1)},
)
@dataclass(frozen=True)
class MaxViT(Selector):
    """Along every axis, query at x sees the y with y // size = x // size (block), or y % step = x % step (grid).

    step = ceil(side of the grid / size), so that both forms see at most `size` places an axis. With form "grid" this is
    also CrossFormer's long-distance attention, for the interval step.

    Args:
        size: Side of a window, or of the spread-out group, in tokens, for all axes or each.
        form: "block": neighbours; "grid": places spread over the whole grid.
        block: Block size of the layout, in tokens, where a layout is cheaper than lists of neighbours.
    """

    size: int | tuple[int, ...] = 7
    form: Literal["block", "grid"] = "block"
    block: int = 64

    def __post_init__(self) -> None:
        require(is_per_axis(self.size, 1), "size", self.size, "an int of at least 1, or one to three of them")
        require(self.form in ("block", "grid"), "form", self.form, "'block' or 'grid'")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout | TokenIndex:
        """The groups of this grid."""
        grid = grid_of(q.shape[2], k.shape[2], geometry)
        sides = zip(grid, per_axis(self.size, "size", grid), strict=True)
        cuts = tuple(grid_cut(*side) if self.form == "grid" else cyclic_cut(*side, 0) for side in sides)
        return window_pattern(cuts, geometry.prefix, geometry.suffix, self.block, str(q.device))
