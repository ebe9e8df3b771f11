"""DraftAttention: a low-resolution map from pooled frames says which tiles of the frames attend to which."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.where._blocks import head_scores
from saccade.mechanisms.where._regions import Plan, RegionSelector, grid_of, keep_text, regions_layout, tiles
from saccade.types import Geometry, Kind, Pattern


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """Tiles of 8 x 8 from 4,096 tokens on, smaller ones before, and shares of their map."""
    side = min(8, max(2, math.isqrt(max(n // 64, 1))))
    return tuple({"tile": (side, side), "density": kept, "block": side * side} for kept in (0.05, 0.1, 0.25, 0.5))


@register(
    "draft",
    Kind.SELECTOR,
    summary="Frames pooled to a low resolution give a draft map; its largest entries, per head, are computed in full.",
    papers=("DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance",),
    year=2025,
    code="shawnricecake/draft-attention",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="density = 1",
    complexity="N^2",
    deviations=(
        (
            "Every tile of queries keeps its best tile of keys at least. The authors' threshold is one per head and "
            "may leave a tile with nothing but text, or with nothing at all."
        ),
        "Tiles at the borders of frames that the tile does not divide are cut short; the authors refuse such frames.",
        "The draft map is scaled by D^-0.5 whatever `scale` the attention uses.",
    ),
    example={"tile": (4, 4), "density": 0.3, "block": 16},
    exact=lambda n: {"density": 1.0},  # noqa: ARG005
    ladder=_ladder,
)
@dataclass(frozen=True)
class Draft(RegionSelector):
    """Draft map A = softmax(mean(Q_i) . mean(K_j) / sqrt(D)) over tiles j of all frames; the largest of A are kept.

    Tiles are rectangles of one frame: the last two axes of the grid, all earlier ones count frames. One threshold for
    a head, the floor((1 - density) n)-th smallest of the n entries of A, those equal to it kept. Text sees and is seen
    by all. Tokens are moved so that a tile lies together.

    Args:
        tile: Height and width of a tile; on a grid of one axis a tile is height * width tokens.
        density: Fraction of the draft map that is kept, text not counted.
        block: Block size of the layout: changes the work, never the result.
    """

    tile: tuple[int, int] = (8, 16)
    density: float = 0.1
    block: int = 64

    def __post_init__(self) -> None:
        require(len(self.tile) == 2 and min(self.tile) >= 1, "tile", self.tile, "a height and a width of at least 1")
        require(0 < self.density <= 1, "density", self.density, "a fraction in (0, 1]")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry) -> Plan:
        """Tiles of queries and the tiles of keys they read."""
        grid = grid_of(q, k, geometry)
        height, width = self.tile
        tile = (height * width,) if len(grid) == 1 else (1,) * (len(grid) - 2) + (height, width)
        regions = tiles(grid, tile, geometry, q.device)
        count = regions.count - regions.text
        drafts = (regions.means(regions.move(x))[:, :, :count] for x in (q, k))
        draft = (head_scores(*drafts) * q.shape[3] ** -0.5).softmax(-1)
        chosen = keep_text(self._largest(draft), regions, regions)
        return Plan(regions, regions, regions_layout(chosen, regions, regions, self.block))

    def _largest(self, draft: Tensor) -> Tensor:
        """The entries of `[B, H, R, R]` at or above their head's threshold, and the first of each row."""
        entries = draft.flatten(2)
        dropped = int((1 - self.density) * entries.shape[2])
        best = torch.zeros_like(draft, dtype=torch.bool)
        if not entries.shape[2]:
            return best
        best = best.scatter_(-1, draft.argmax(-1, keepdim=True), value=True)
        if dropped == 0:
            return torch.ones_like(best)
        threshold = entries.kthvalue(dropped, dim=2).values
        return best | (draft >= threshold[..., None, None])
