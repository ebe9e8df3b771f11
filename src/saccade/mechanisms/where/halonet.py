"""HaloNet: blocks of queries attend to their block and a halo of its surroundings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._grids import grid_of, is_per_axis, per_axis
from saccade.mechanisms.where._windows import Cut, window_pattern
from saccade.types import BlockLayout, Geometry, Kind, Pattern, TokenIndex


@register(
    "halonet",
    Kind.SELECTOR,
    summary="Blocked local attention: the queries of a block of the grid share the block and a halo around it.",
    papers=("Scaling Local Self-Attention for Parameter Efficient Visual Backbones",),
    year=2021,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=False,
    exact_when="size >= every axis of the grid",
    complexity="N",
    deviations=(
        "The pattern alone, for any q, k, v; with relative embeddings and strides it is the layer `halonet_attention`.",
        (
            "Places past the border are hidden; the paper does not say, and reimplementations differ: halonet-pytorch "
            "hides them, timm lets zeros take part in the softmax."
        ),
        "Grids of one to three axes, also of sides that `size` does not divide. Text sees and is seen by all.",
    ),
    example={"size": 8, "halo": 3, "block": 8},
    exact=lambda n: {"size": max(n, 1), "halo": 0},
)
@dataclass(frozen=True)
class HaloNet(Selector):
    """Along every axis, query at x in [s, s + size), s a multiple of size, sees s - halo .. s + size + halo - 1.

    Args:
        size: Side of a block of queries in tokens, for all axes or each.
        halo: Tokens around the block that it sees, too, for all axes or each.
        block: Block size of the layout, in tokens, where a layout is cheaper than lists of neighbours.
    """

    size: int | tuple[int, ...] = 8
    halo: int | tuple[int, ...] = 3
    block: int = 64

    def __post_init__(self) -> None:
        require(is_per_axis(self.size, 1), "size", self.size, "an int of at least 1, or one to three of them")
        require(is_per_axis(self.halo, 0), "halo", self.halo, "an int of at least 0, or one to three of them")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout | TokenIndex:
        """The blocks of this grid and their halos."""
        grid = grid_of(q.shape[2], k.shape[2], geometry)
        sides = zip(grid, per_axis(self.size, "size", grid), per_axis(self.halo, "halo", grid), strict=True)
        cuts = tuple(Cut(length, size, halo=halo) for length, size, halo in sides)
        return window_pattern(cuts, geometry.prefix, geometry.suffix, self.block, str(q.device))
