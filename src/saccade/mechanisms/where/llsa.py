"""LLSA: top-k blocks found from coarse to fine, and coarser summaries of what lies beside the way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.catalog import register
from saccade.mechanisms.base import PLAIN, require, require_pattern
from saccade.mechanisms.where._blocks import head_scores, mean_pool
from saccade.mechanisms.where._orders import z_order
from saccade.mechanisms.where._regions import Plan, Regions, RegionSelector, from_cells, grid_of
from saccade.mechanisms.where._weighted import attend_weighted, merge_first
from saccade.ops import block_attend
from saccade.ops.checks import check_qkv, check_segments, resolve_scale
from saccade.ops.dispatch import RunRecord, is_recording, record
from saccade.types import AttentionOutput, BlockLayout, Geometry, Kind, Pattern


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """The authors' blocks of 16, smaller ones on short sequences, and shares of them."""
    block = 16 if n >= 4096 else 4
    return tuple({"block": block, "topk": max(2, round(n / block * share))} for share in (0.02, 0.05, 0.12, 0.25))


@register(
    "llsa",
    Kind.SELECTOR,
    summary="Top-k blocks searched through a hierarchy of means, and weighted means of coarser blocks as further keys.",
    papers=("Trainable Log-linear Sparse Attention for Efficient Diffusion Transformers",),
    year=2025,
    code="SingleZombie/LLSA",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    exact_when="topk >= N / block, enrich = False",
    complexity="N log N",
    deviations=(
        "Runs on the block engine, forward and backward; the authors' index-only kernels are not built.",
        (
            "Any grid is put in Z order by the bits of its coordinates; the authors have squares of powers of two. "
            "Text stays outside the hierarchy, sees and is seen by all."
        ),
        "The last block of a level, where N is not divisible, counts its tokens as their varlen kernels do.",
    ),
    example={"block": 4, "topk": 4},
    exact=lambda n: {"block": 4, "topk": max(n, 1), "enrich": False},
    ladder=_ladder,
)
@dataclass(frozen=True)
class LLSA(RegionSelector):
    """Level l holds the means of `block` neighbours of level l - 1; level 0 are the tokens, level L the coarsest.

    At level L each block of queries picks the topk blocks of keys with the largest inner product of their means. At
    every finer level a block picks its topk among the `block` children of each block that its parent picked. The
    tokens of the blocks picked at level 1 are attended to. With `enrich`, so are all means of level L, and those means
    of every level between whose parents were picked, each as if it were the block^l tokens that it stands for: its
    weight is block^l exp(q . k). Nothing is left out for being counted finer already, as in the authors' code.

    Args:
        block: Children of a block; in Z order 4 or 16 of them make a square.
        topk: Blocks picked at every level.
        levels: L; None means as many as leave at least max(topk, 2) blocks at the coarsest.
        enrich: Attend to the coarser means too.
    """

    adds = True

    block: int = 16
    topk: int = 8
    levels: int | None = None
    enrich: bool = True

    def __post_init__(self) -> None:
        require(self.block >= 2, "block", self.block, "at least 2 children")
        require(self.topk >= 1, "topk", self.topk, "at least 1 block")
        require(self.levels is None or self.levels >= 1, "levels", self.levels, "None or at least 1")

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry) -> Plan:
        """Z order, and the fine pairs; the coarser means are added by the call."""
        regions, cells = self._regions(q, k, geometry)
        picked = self._search(*(regions.move(x)[:, :, :cells] for x in (q, k)))
        return Plan(regions, regions, self._fine(picked[0], cells, q.shape[2]))

    def _regions(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Regions, int]:
        """The order of the tokens, and how many lie on the grid."""
        grid = grid_of(q, k, geometry)
        order = z_order(grid, q.device) if len(grid) > 1 else torch.arange(grid[0], device=q.device)
        return from_cells(order.argsort()[None, None], len(order), geometry), len(order)

    def _depth(self, cells: int) -> int:
        """L."""
        if self.levels is not None:
            return self.levels
        depth = 1
        while -(-cells // self.block ** (depth + 1)) >= max(self.topk, 2):
            depth += 1
        return depth

    def _search(self, q: Tensor, k: Tensor) -> list[Tensor]:
        """Blocks picked at levels 1 .. L: int64 `[B, H, blocks of that level, topk at most]` each, -1 = none."""
        queries, keys = [q], [k]
        for _ in range(self._depth(q.shape[2])):
            queries.append(mean_pool(queries[-1], self.block))
            keys.append(mean_pool(keys[-1], self.block))
        scores = head_scores(queries[-1], keys[-1])
        picked = [scores.topk(min(self.topk, scores.shape[-1]), -1).indices]
        for level in range(len(queries) - 2, 0, -1):
            picked.insert(0, self._among_children(queries[level], keys[level], picked[0]))
        return picked

    def _among_children(self, q: Tensor, k: Tensor, parents: Tensor) -> Tensor:
        """For each block of q `[B, H, n, D]` the topk of the children of `parents` `[B, H, P, K]`: like `_search`."""
        batch, heads, count, dim = q.shape
        families, width = parents.shape[2], self.block
        k = pad(k, (0, 0, 0, families * width - k.shape[2])).unflatten(2, (families, width))
        k = k.repeat_interleave(heads // k.shape[1], 1).flatten(3)
        known = parents.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, width * dim)
        candidates = k.gather(2, known).view(batch, heads, families, -1, dim)
        place = (parents[..., None] * width + torch.arange(width, device=q.device)).flatten(3)
        there = (parents >= 0).repeat_interleave(width, 3) & (place < count)
        siblings = pad(q, (0, 0, 0, families * width - count)).unflatten(2, (families, width))
        scores = (siblings @ candidates.mT).masked_fill(~there[..., None, :], -torch.inf)
        best = scores.topk(min(self.topk, scores.shape[-1]), -1)
        found = place[..., None, :].expand_as(scores).gather(-1, best.indices)
        return found.masked_fill(best.values == -torch.inf, -1).flatten(2, 3)[:, :, :count]

    def _fine(self, picked: Tensor, cells: int, total: int) -> BlockLayout:
        """The layout of the picked blocks of tokens, and of text behind the grid."""
        rows = pad(picked, (0, 0, 0, -(-total // self.block) - picked.shape[2]), value=-1)
        layout = BlockLayout.from_indices(rows, total, total, self.block)
        if cells == total:
            return layout
        text = torch.arange(cells, total, device=picked.device)
        return layout | BlockLayout.tokens(
            total, total, key_tokens=text, query_tokens=text, block=self.block, device=picked.device
        )  # fmt: skip

    def __call__(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, scale: float | None = None,
        return_lse: bool = False, impl: str = "auto",
    ) -> Tensor | AttentionOutput:  # fmt: skip
        """As for every selector."""
        check_qkv(q, k, v)
        check_segments(q, k, geometry.q_segments, geometry.kv_segments)
        require_pattern(self.card, q, k, geometry)
        started = time.perf_counter()
        regions, cells = self._regions(q, k, geometry)
        q, k, v = (regions.move(x) for x in (q, k, v))
        picked = self._search(q[:, :, :cells].detach(), k[:, :, :cells].detach())
        layout = self._fine(picked[0], cells, q.shape[2])
        if is_recording():
            record(RunRecord("select", self.card.name, select_seconds=time.perf_counter() - started))
        factor = resolve_scale(scale, q.shape[3])
        out, lse = block_attend(q, k, v, layout, scale=factor, return_lse=True, impl=impl)
        if self.enrich and cells:
            coarse = self._coarse(q[:, :, :cells], k[:, :, :cells], v[:, :, :cells], picked, factor, impl)
            out, lse = merge_first(AttentionOutput(out, lse), coarse)
        out = regions.restore(out)
        return AttentionOutput(out, regions.restore(lse)) if return_lse and lse is not None else out

    def _coarse(
        self, q: Tensor, k: Tensor, v: Tensor, picked: list[Tensor], scale: float, impl: str
    ) -> list[AttentionOutput]:
        """Attention to the means of levels 1 .. L, each weighted by the tokens it stands for."""
        cells, width = q.shape[2], self.block
        parts = []
        for level in range(1, len(picked) + 1):
            k, v = mean_pool(k, width), mean_pool(v, width)
            left = cells - torch.arange(k.shape[2], device=k.device) * width**level
            layout = None
            if level < len(picked):
                layout = BlockLayout.from_indices(picked[level], cells, k.shape[2], (width ** (level + 1), width))
            parts.append(attend_weighted(q, k, v, left.clamp(max=width**level), layout, scale, impl))
        return parts
