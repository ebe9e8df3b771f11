"""Sparse VideoGen: each head of a video model attends within frames or across them, whichever loses less."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.where._blocks import head_scores
from saccade.mechanisms.where._regions import Plan, Regions, RegionSelector, from_cells, grid_of
from saccade.ops.checks import accumulation_dtype
from saccade.types import BlockLayout, Geometry, Kind, Pattern


@register(
    "svg",
    Kind.SELECTOR,
    summary="Heads are found spatial or temporal on sampled queries; a band over frames, or over places, is computed.",
    papers=("Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity",),
    year=2025,
    code="svg-project/Sparse-VideoGen",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="density = 1",
    complexity="N^2",
    deviations=(
        (
            "Heads are judged by the two bands that will run; the authors judge by bands of a fixed 1.5 frames in "
            "blocks of 128 (marked as to be fixed in their code)."
        ),
        (
            "The sampled queries are distinct, drawn from `seed` over the whole grid and the same for every call; the "
            "authors draw them anew, among the first 10,000 tokens."
        ),
        "The band is that of their HunyuanVideo model; for Wan they also keep the keys of the first frame.",
        (
            "`plan` and `pattern`, which see no values, judge by the squared error of the weights: the mean error for "
            "white values. A call judges by the error of the output, as the authors do."
        ),
    ),
    example={"density": 0.3, "samples": 16, "block": 16},
    exact=lambda n: {"density": 1.0},  # noqa: ARG005
    ladder=lambda n: tuple({"density": kept, "block": min(64, max(n // 64, 1))} for kept in (0.1, 0.25, 0.5, 0.75)),
)
@dataclass(frozen=True)
class SVG(RegionSelector):
    """Spatial heads keep |i - j| < w in frame order, temporal heads keep |i - j| < w with places before frames.

    The first axis of the grid counts frames. Temporal heads have their tokens moved so that all frames of one place
    lie together, and then read the same band; a head is temporal if that errs less, in the mean square of the outputs
    of `samples` queries against full attention. w = N (1 - sqrt(1 - s)) in tokens, s = density - 2 text / N, rounded
    down to blocks but at least one: the band of that share of all pairs. Text sees and is seen by all.

    Args:
        density: Share of all pairs that is kept, text included.
        samples: Queries on which heads are judged.
        seed: Draws these queries.
        block: Block size of the layout, to which the band is rounded.
    """

    density: float = 0.25
    samples: int = 64
    seed: int = 0
    block: int = 128

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "density", self.density, "a fraction in (0, 1]")
        require(self.samples >= 1, "samples", self.samples, "at least 1 query")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry) -> Plan:
        """The order of each head, and the band that all of them share; see the deviations."""
        return self._plan(q, k, None, geometry)

    def plan_with_values(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Plan:
        """The same, heads judged by their output."""
        return self._plan(q, k, v, geometry)

    def _plan(self, q: Tensor, k: Tensor, v: Tensor | None, geometry: Geometry) -> Plan:
        grid = grid_of(q, k, geometry)
        cells, total = math.prod(grid), q.shape[2]
        band = self._band(total, total - cells)
        place = torch.arange(cells, device=q.device)
        spatial = from_cells(place[None, None], cells, geometry).order
        inside = place.view(grid[0], math.prod(grid[1:])).T.reshape(1, 1, -1)  # frames of each place together
        temporal = torch.cat([spatial[..., inside[0, 0]], spatial[..., cells:]], -1)
        errors = [self._error(q, k, v, order[0, 0], band, cells) for order in (spatial, temporal)]
        order = torch.where((errors[1] < errors[0])[..., None], temporal, spatial)
        moved = Regions(order, torch.arange(total, device=q.device).expand_as(order), total)
        return Plan(moved, moved, self._layout(total, band, cells, q.device))

    def _band(self, total: int, text: int) -> int:
        """w, in tokens."""
        share = max(self.density - 2 * text / max(total, 1), 0.0) if self.density < 1 else 1.0
        width = int(total * (1 - math.sqrt(1 - share)))
        return total if share == 1 else max(width // self.block, 1) * self.block

    def _layout(self, total: int, band: int, cells: int, device: torch.device) -> BlockLayout:
        """The band, and text at the end that sees and is seen by all."""
        layout = BlockLayout.window(total, total, max(band - 1, 0), max(band - 1, 0), block=self.block, device=device)
        if cells == total:
            return layout
        text = torch.arange(cells, total, device=device)
        return layout | BlockLayout.tokens(
            total, total, key_tokens=text, query_tokens=text, block=self.block, device=device
        )  # fmt: skip

    def _error(self, q: Tensor, k: Tensor, v: Tensor | None, order: Tensor, band: int, cells: int) -> Tensor:
        """Mean squared error of the sampled queries if only the band over `order` is kept: `[B, H]`."""
        drawn = torch.randperm(cells, generator=torch.Generator().manual_seed(self.seed))[: self.samples].to(q.device)
        q, k = (x.to(accumulation_dtype(x.dtype)).index_select(2, order) for x in (q, k))
        scores = head_scores(q[:, :, drawn], k) * q.shape[3] ** -0.5
        place = torch.arange(len(order), device=q.device)
        kept = ((place - drawn[:, None]).abs() < band) | (place >= cells)
        lost = scores.softmax(-1) - scores.masked_fill(~kept, -torch.inf).softmax(-1)
        if v is not None:
            lost = head_scores(lost, v.to(lost.dtype).index_select(2, order).mT)
        return lost.square().mean((2, 3))
