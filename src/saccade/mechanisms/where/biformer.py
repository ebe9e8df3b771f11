"""BiFormer's bi-level routing: regions of the image choose regions, and tokens attend within those."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.where._blocks import head_scores
from saccade.mechanisms.where._regions import Plan, RegionSelector, grid_of, keep_text, regions_layout, tiles
from saccade.types import Geometry, Kind, Pattern


@register(
    "biformer",
    Kind.SELECTOR,
    summary="Bi-level routing: mean queries and keys of regions choose the topk regions that a region's tokens read.",
    papers=("BiFormer: Vision Transformer with Bi-Level Routing Attention",),
    year=2023,
    code="rayleizhu/BiFormer",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    exact_when="topk >= the number of regions",
    complexity="N^2",
    deviations=(
        (
            "The routing alone: the projections and the depthwise convolution on the values (LCE) that the authors' "
            "layer adds are left to the model. Their softmax is scaled by the width of all heads together, C^-0.5; "
            "give `scale` for that."
        ),
        (
            "Regions at the far borders are cut short where an axis is not divisible. The authors pad them with "
            "zeros, which take part in their softmax (marked as to be fixed in their code)."
        ),
        "regions per axis is fixed, as in the paper's models, so that work grows with N^2; N^(4/3) needs it to grow.",
        "On grids of one or three axes every axis is cut into `windows`; the paper has images only.",
    ),
    example={"windows": 4, "topk": 2, "block": 16},
    exact=lambda n: {"windows": 4, "topk": 64},  # noqa: ARG005
    ladder=lambda n: tuple(  # 8 regions an axis, 16 where those of an image would be larger than 8 x 8 tokens
        {"windows": 8 if n < 16384 else 16, "topk": topk, "block": min(64, max(n // 64, 1))}
        for topk in ((1, 4, 16, 64) if n < 16384 else (8, 16, 64, 256))
    ),
)
@dataclass(frozen=True)
class BiFormer(RegionSelector):
    """Region i attends to the topk regions j with the largest sum over heads of mean(Q_i) . mean(K_j).

    Regions are boxes of max(size // windows, 1) tokens along each axis. All heads share one choice. Text is not
    routed; it sees and is seen by all. No gradient goes through the choice, as in the paper.

    Args:
        windows: Regions along each axis of the grid.
        topk: Regions that a region attends to.
        block: Block size of the layout: changes the work, never the result.
    """

    windows: int = 7
    topk: int = 4
    block: int = 64

    def __post_init__(self) -> None:
        require(self.windows >= 1, "windows", self.windows, "at least 1 region")
        require(self.topk >= 1, "topk", self.topk, "at least 1 region")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry) -> Plan:
        """Regions of queries and the regions of keys they read."""
        grid = grid_of(q, k, geometry)
        regions = tiles(grid, tuple(max(size // self.windows, 1) for size in grid), geometry, q.device)
        count = regions.count - regions.text
        means = (regions.means(regions.move(x))[:, :, :count] for x in (q, k))
        affinity = head_scores(*means).sum(1, keepdim=True)
        best = affinity.topk(min(self.topk, count), -1).indices
        chosen = torch.zeros_like(affinity, dtype=torch.bool).scatter_(-1, best, value=True)
        return Plan(regions, regions, regions_layout(keep_text(chosen, regions, regions), regions, regions, self.block))
