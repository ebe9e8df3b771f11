"""Swin: attention inside windows, which every other layer shifts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._grids import grid_of, is_per_axis, per_axis
from saccade.mechanisms.where._windows import cyclic_cut, window_pattern
from saccade.types import BlockLayout, Geometry, Kind, Pattern, TokenIndex


@register(
    "swin",
    Kind.SELECTOR,
    summary="Tokens of a grid see those of their own window; in every other layer the windows are shifted.",
    papers=("Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",),
    year=2021,
    code="microsoft/Swin-Transformer",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=False,
    exact_when="window >= every axis of the grid",
    complexity="N",
    deviations=(
        "The pattern alone, for any q, k, v; with relative position bias it is the layer `swin_attention`.",
        (
            "Windows that the border cuts are smaller; the authors' detection code pads with zeros, which take part in "
            "the softmax. Along an axis that one window holds there is no shift (theirs: if either does)."
        ),
        "Grids of one to three axes. Text before and after the grid sees and is seen by all.",
    ),
    example={"window": 8, "shift": 4, "block": 8},
    exact=lambda n: {"window": max(n, 1)},
)
@dataclass(frozen=True)
class Swin(Selector):
    """Query at x sees the places y with floor((y - shift) / window) = floor((x - shift) / window) along every axis.

    This is the authors' cyclic shift with its mask, which keeps apart what the shift brings together.

    Args:
        window: Side of a window in tokens, for all axes or each.
        shift: Where windows begin, for all axes or each; 0 in even layers, window // 2 in odd ones.
        block: Block size of the layout, in tokens, where a layout is cheaper than lists of neighbours.
    """

    window: int | tuple[int, ...] = 7
    shift: int | tuple[int, ...] = 0
    block: int = 64

    def __post_init__(self) -> None:
        require(is_per_axis(self.window, 1), "window", self.window, "an int of at least 1, or one to three of them")
        require(is_per_axis(self.shift, 0), "shift", self.shift, "an int of at least 0, or one to three of them")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout | TokenIndex:
        """The windows of this grid."""
        grid = grid_of(q.shape[2], k.shape[2], geometry)
        windows, shifts = per_axis(self.window, "window", grid), per_axis(self.shift, "shift", grid)
        for window, shift in zip(windows, shifts, strict=True):
            require(shift < window, "shift", self.shift, f"less than window={self.window}")
        cuts = tuple(map(cyclic_cut, grid, windows, shifts))
        return window_pattern(cuts, geometry.prefix, geometry.suffix, self.block, str(q.device))
