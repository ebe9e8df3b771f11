"""YOPO's neighbour-aware attention: in a language model, tokens of an image see only those around them in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Selector, require
from saccade.mechanisms.where._grids import Line, grid_of
from saccade.types import BlockLayout, Geometry, Kind
from saccade.types.grids import candidates, grid_layout


@register(
    "neighbor_aware",
    Kind.SELECTOR,
    summary="Tokens of an image see text and the square of image tokens around them; text sees all, as before.",
    papers=("Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See",),
    year=2024,
    code="zhaowt61/YOPO_MLLM_Pruning_fork",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse"}),
    exact_when="window >= 2 * the longest side of the grid - 1, or geometry.grid = None: there are no visual tokens",
    complexity="N^2",
    deviations=(
        "The neighbours alone, not the pruning of heads and hidden channels for visual tokens or the layers they skip.",
        (
            "The authors' mask hides the future from text but not from neighbours in the image. That is "
            "`causal_text` with geometry.causal = False; with True, neighbours ahead are hidden, too."
        ),
        (
            "The tokens of `geometry.grid` are the visual ones: one image or video per sequence, of any size (the "
            "authors' is 24 x 24). Queries are those of the whole prompt, or text behind the image."
        ),
        "Work is N for the image; text sees all.",
    ),
    example={"window": 3, "block": 16},
    exact=lambda n: {"window": 2 * max(n, 1) - 1},
)
@dataclass(frozen=True)
class NeighborAware(Selector):
    """Query at x of the grid sees the keys at y with |y - x| <= (window - 1) / 2 along every axis, and text.

    Args:
        window: Side of the square of neighbours in tokens, odd.
        causal_text: Hide what comes later from text, and later text from the image, though neighbours in the image see
            each other both ways.
        block: Block size of the layout, in tokens.
    """

    window: int = 7
    causal_text: bool = False
    block: int = 64

    def __post_init__(self) -> None:
        require(self.window >= 1 and self.window % 2 == 1, "window", self.window, "an odd number of tokens")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """The neighbours on this grid."""
        queries, keys = q.shape[2], k.shape[2]
        behind = geometry.prefix + (geometry.grid_tokens or 0)
        if geometry.grid is None or behind <= keys - queries < keys:
            right = 0 if self.causal_text else -1
            return BlockLayout.window(queries, keys, -1, right, block=self.block, device=q.device)
        grid = grid_of(queries, keys, geometry)
        reach = (self.window - 1) // 2
        return _pattern(grid, reach, geometry.prefix, geometry.suffix, self.causal_text, self.block, str(q.device))


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # kept tensors may serve a backward pass later
def _pattern(
    grid: tuple[int, ...], reach: int, prefix: int, suffix: int, causal_text: bool, block: int, device: str
) -> BlockLayout:
    """The pattern of this grid; built once."""
    lines = []
    for size in grid:
        place = torch.arange(size, device=device)
        most = min(2 * reach + 1, size)
        lines.append(Line((place - reach).clamp(min=0), (place + reach).clamp(max=size - 1), 1, most))
    layout = grid_layout(lines, prefix, suffix, candidates(lines, prefix, suffix, block))
    if not causal_text:
        return layout
    total = layout.queries

    def not_later(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) | ((i >= prefix) & (j >= prefix) & (i < total - suffix) & (j < total - suffix))

    return BlockLayout.from_mask_mod(not_later, total, total, block=block, candidates=layout)
