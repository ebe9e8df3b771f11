"""CSWin: half of the heads attend within vertical stripes of the image, half within horizontal ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._grids import grid_of
from saccade.mechanisms.where._windows import Cut, head_window_patterns
from saccade.types import BlockLayout, Geometry, Kind, Pattern, TokenIndex


@register(
    "cswin",
    Kind.SELECTOR,
    summary="Cross-shaped windows: half of the heads see vertical stripes of the grid, half horizontal ones.",
    papers=("CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",),
    year=2021,
    code="microsoft/CSWin-Transformer",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=False,
    exact_when="stripe >= every axis of the grid",
    complexity="N^1.5",
    deviations=(
        "The pattern alone, for any q, k, v; with LePE it is the layer `cswin_attention`.",
        (
            "Vertical stripes come first, as in the authors' code (the paper writes horizontal first). On one axis, as "
            "without a grid, all heads see stretches of it."
        ),
        (
            "Where the side does not divide, the stripes lie in the middle as in the authors' segmentation code, whose "
            "padding takes part in the softmax; here nothing is padded."
        ),
        "Text before and after the grid sees and is seen by all.",
    ),
    heads_differ=True,
    example={"stripe": 8, "block": 8},
    exact=lambda n: {"stripe": max(n, 1)},
)
@dataclass(frozen=True)
class CSWin(Selector):
    """The first half of the heads sees all rows of a stripe of columns, the second all columns of a stripe of rows.

    Args:
        stripe: Width of a stripe in tokens; the authors take 1, 2, 7, 7 in the four stages of an image of 224.
        block: Block size of the layout, in tokens, where a layout is cheaper than lists of neighbours.
    """

    stripe: int = 7
    block: int = 64

    def __post_init__(self) -> None:
        require(self.stripe >= 1, "stripe", self.stripe, "at least 1 token")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout | TokenIndex:
        """The stripes of this grid."""
        grid = grid_of(q.shape[2], k.shape[2], geometry)
        require(len(grid) <= 2, "geometry.grid", grid, "one or two axes")
        cuts = [stripe_cut(size, self.stripe) for size in grid]
        parts: tuple[tuple[int, tuple[Cut, ...]], ...] = ((1, tuple(cuts)),)
        if len(grid) == 2 and self.stripe < max(grid):
            half, odd = divmod(q.shape[1], 2)
            require(not odd, "heads", q.shape[1], "an even number, for vertical and horizontal stripes")
            whole = [Cut(size, size) for size in grid]
            parts = ((half, (whole[0], cuts[1])), (half, (cuts[0], whole[1])))
        return head_window_patterns(parts, geometry.prefix, geometry.suffix, self.block, str(q.device))


def stripe_cut(size: int, stripe: int) -> Cut:
    """Stripes of an axis, what is missing in the last one shared between both ends."""
    return Cut(size, size) if size <= stripe else Cut(size, stripe, shift=-(-size % stripe // 2))
