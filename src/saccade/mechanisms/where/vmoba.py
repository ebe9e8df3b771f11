"""VMoBA: MoBA for video, with chunks that change shape from layer to layer, ranked over a whole head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.where._blocks import head_scores
from saccade.mechanisms.where._regions import Plan, Regions, RegionSelector, grid_of, keep_text, regions_layout, tiles
from saccade.types import Geometry, Kind, Pattern

EPSILON = 1e-6
"""Added to sums that divide, as the authors do."""


@register(
    "vmoba",
    Kind.SELECTOR,
    summary="Chunks of frames, columns or cuboids by layer; query-chunk gates ranked per head up to a share of them.",
    papers=("VMoBA: Mixture-of-Block Attention for Video Diffusion Models",),
    year=2025,
    code="KwaiVGI/VMoBA",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="threshold = 1",
    complexity="N^2",
    deviations=(
        (
            "The authors' repository holds no code any more; the rule is that of its copy in FastVideo and sglang, "
            "whose default is scope='query'. The default here is the paper's: over the whole head."
        ),
        "scope='all' ranks over the heads of one sequence; the code ranks over the batch too.",
        (
            "Chunks at the far borders are cut short. The code does so for frames only and refuses grids that "
            "chunks of two or three axes do not divide."
        ),
        "Text tokens, which the code does not have, see and are seen by all and are not ranked.",
        (
            "Each query attends to the chunks it chose exactly, but a block engine computes for each block of queries "
            "the union of what they chose, and masks."
        ),
    ),
    example={"chunks": ((0.125,),), "threshold": 0.3, "scope": "query", "block": 32},
    exact=lambda n: {"chunks": ((0.25,),), "threshold": 1.0},  # noqa: ARG005
    ladder=lambda n: tuple(
        {"chunks": ((0.0625,), (0.25, 0.25), (0.5, 0.25, 0.25)), "threshold": t, "block": min(64, max(n // 16, 1))}
        for t in (0.1, 0.25, 0.5, 0.75)
    ),
)
@dataclass(frozen=True)
class VMoBA(RegionSelector):
    """Query i and chunk c have the gate g = q_i . mean(K_c), brought to [0, 1] within a scope by its least and largest.

    Every query keeps its own chunk. Of the other gates in the scope the largest are kept, at least one, up to and with
    the one that takes the sum of all kept, own chunks included, to `threshold` of the sum of all. With `topk` instead,
    as many as topk chunks for each query are kept in the scope, own chunks first.

    Layer number l uses `chunks[l % len(chunks)]`: one size cuts the first axis only (frames), two cut the last two
    (height and width, over all frames), three all.

    Args:
        chunks: Sizes of a chunk along the axes it cuts, for the layers in turn; a float is that fraction of the axis.
        layer: Number of the layer among the sparse ones.
        threshold: Share of the scope's gates that is kept.
        topk: Instead of `threshold`: chunks for each query, its own included.
        scope: What is ranked together: a query's chunks, all of a "head", all "heads", or a "chunk"'s queries.
        block: Block size of the layout: changes the work, never the result.
    """

    chunks: tuple[tuple[int | float, ...], ...] = ((2,), (4, 13), (4, 4, 13))
    layer: int = 0
    threshold: float = 0.25
    topk: int | None = None
    scope: Literal["query", "head", "all", "chunk"] = "head"
    block: int = 64

    def __post_init__(self) -> None:
        good = len(self.chunks) >= 1 and all(
            1 <= len(sizes) <= 3 and all(map(_is_size, sizes)) for sizes in self.chunks
        )
        require(good, "chunks", self.chunks, "tuples of one to three sizes, ints of at least 1 or floats in (0, 1]")
        require(self.layer >= 0, "layer", self.layer, "a number of at least 0")
        require(0 < self.threshold <= 1, "threshold", self.threshold, "a share in (0, 1]")
        require(self.topk is None or self.topk >= 1, "topk", self.topk, "None or at least 1 chunk, the query's own")
        scopes = ("query", "head", "all", "chunk")
        require(self.scope in scopes, "scope", self.scope, f"one of {scopes}")
        ranked = self.topk is None or self.scope != "chunk"
        require(ranked, "scope", self.scope, "'query', 'head' or 'all' together with topk")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry) -> Plan:
        """Every query by itself, and the chunks it reads."""
        grid = grid_of(q, k, geometry)
        chunks = tiles(grid, self._chunk(grid), geometry, q.device)
        text = geometry.prefix + geometry.suffix
        count, cells = chunks.count - chunks.text, q.shape[2] - text
        places = torch.arange(q.shape[2], device=q.device)[None, None]
        rows = Regions(chunks.order, places, q.shape[2], text)
        means = chunks.means(chunks.move(k))[:, :, :count]
        gates = head_scores(rows.move(q)[:, :, :cells].to(means.dtype), means)
        own = chunks.labels[..., :cells, None] == torch.arange(count, device=q.device)
        chosen = self._rank(gates, own.expand_as(gates)) if gates.numel() else own.expand_as(gates)
        return Plan(rows, chunks, regions_layout(keep_text(chosen | own, rows, chunks), rows, chunks, self.block))

    def _chunk(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Size of a chunk along every axis of the grid."""
        sizes = self.chunks[self.layer % len(self.chunks)]
        fits = f"a chunk of at most {len(grid)} sizes for grid={grid}, layer={self.layer}"
        require(len(sizes) <= len(grid), "chunks", self.chunks, fits)
        start = 0 if len(sizes) == 1 else len(grid) - len(sizes)
        chunk = list(grid)
        for axis, size in enumerate(sizes, start):
            chunk[axis] = max(1, round(size * grid[axis])) if isinstance(size, float) else size
        return tuple(max(size, 1) for size in chunk)

    def _rank(self, gates: Tensor, own: Tensor) -> Tensor:
        """What is kept of gates `[B, H, M, C]` beside the own chunks: bool of the same shape."""
        _, heads, queries, chunks = gates.shape
        together = {"query": 3, "head": 2, "all": 1, "chunk": 1}[self.scope]
        if self.scope == "chunk":
            gates, own = gates.permute(0, 3, 1, 2), own.permute(0, 3, 1, 2)
            together = 2
        entries, mine = gates.flatten(together), own.flatten(together)
        if self.topk is not None:
            per_scope = {"query": 1, "head": queries, "all": heads * queries}[self.scope]
            best = entries.masked_fill(mine, torch.inf).topk(min(self.topk, chunks) * per_scope, -1).indices
            kept = torch.zeros_like(mine).scatter_(-1, best, value=True)
        else:
            kept = self._up_to_threshold(entries, mine)
        kept = kept.view(gates.shape)
        return kept.permute(0, 2, 3, 1) if self.scope == "chunk" else kept

    def _up_to_threshold(self, entries: Tensor, mine: Tensor) -> Tensor:
        """The largest of the entries that are not `mine`, `[..., E]`, up to the threshold."""
        least, largest = entries.aminmax(dim=-1, keepdim=True)
        spread = largest - least
        normal = (entries - least) / torch.where(spread <= EPSILON, 1.0, spread)
        total = normal.sum(-1, keepdim=True) + EPSILON
        wanted = (self.threshold - (normal * mine).sum(-1, keepdim=True) / total).clamp(min=0)
        ordered, order = normal.masked_fill(mine, 0.0).sort(-1, descending=True)
        enough = ordered.cumsum(-1) / total >= wanted
        before = torch.nn.functional.pad(enough[..., :-1], (1, 0))
        kept = ~before | (self.threshold == 1)
        return torch.zeros_like(mine).scatter_(-1, order, kept)


def _is_size(size: float) -> bool:
    """Whether this is a number of tokens or a fraction of an axis."""
    return 0 < size <= 1 if isinstance(size, float) else size >= 1
