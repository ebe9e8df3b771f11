"""MoBA: each query attends to the chunks of keys whose mean it likes best, and to its own chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._blocks import block_visibility, head_scores, key_columns, mean_pool, tiled_layout
from saccade.types import BlockLayout, Geometry, Kind, Pattern


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """Shared choices; at N = 8192 about 8, 15, 26 and 47 % of the causal area."""
    chunk = min(max(n // 128, 1), 64)
    return tuple(
        {"chunk": chunk, "topk": max(2, round(n / chunk * kept)), "query_block": 2 * chunk}
        for kept in (0.04, 0.08, 0.14, 0.27)
    )


@register(
    "moba",
    Kind.SELECTOR,
    summary="Top-k chunks of keys by the inner product of the query and the chunk's mean key.",
    papers=("MoBA: Mixture of Block Attention for Long-Context LLMs",),
    year=2025,
    code="MoonshotAI/MoBA",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse", "streaming"}),
    training_free=True,
    exact_when="topk >= N / chunk",
    complexity="N^2",
    deviations=(
        (
            "query_block > 1 (not in the paper, never the default) lets the queries of a block share one choice by "
            "their mean gate: a query's choice then depends on later queries of its block. The chunks from that of "
            "the block's first query on are kept and count as one of topk."
        ),
        (
            "With query_block = 1 each query attends to the paper's choice exactly, but a block engine computes, for "
            "each tile of queries, the union of what they chose, and masks: 1.5 to 1.7 times the chosen pairs on "
            "SmolLM2 at N = 8192, 3.5 times on random data (chunk 512, topk 3, tile 64)."
        ),
    ),
    example={"chunk": 8, "topk": 3, "tile": 16},
    exact=lambda n: {"chunk": 16, "topk": -(-n // 16), "tile": 16},
    ladder=_ladder,
)
@dataclass(frozen=True)
class MoBA(Selector):
    """Chunk c of keys has the gate s_c = q . mean(k_j for j in c).

    A query attends to its own chunk (causally) and to the topk - 1 chunks of its past with the largest gates; chunks
    that hold a later token are never scored. Chunks lie at fixed places, c = j // chunk.

    Args:
        chunk: Keys per chunk.
        topk: Chunks a query attends to, its own included.
        query_block: Queries that share one choice; 1 is the paper. Not tied to places in the sequence: block i holds
            the queries i * query_block and on of the call.
        tile: Queries per block of the layout when `query_block` is 1: changes the work, never the result.
    """

    chunk: int = 512
    topk: int = 3
    query_block: int = 1
    tile: int = 64

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk", self.chunk, "at least 1 token")
        require(self.topk >= 1, "topk", self.topk, "at least 1 chunk, the query's own")
        require(self.query_block >= 1, "query_block", self.query_block, "at least 1 query")
        require(self.tile >= 1, "tile", self.tile, "at least 1 query")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """Own chunk and the best of the past, per head and query (or block of queries)."""
        queries, keys = q.shape[2], k.shape[2]
        block = (self.query_block, self.chunk)
        past, own = block_visibility(queries, keys, block, geometry.causal, q.device)
        share = q.shape[1] // k.shape[1]
        groups = zip(q.split(share, 1), k.split(1, 1), strict=True)  # one at a time stays in cache
        chosen = torch.cat([self._chosen(*group, past, own) for group in groups], 1)
        if self.query_block == 1:
            return tiled_layout(chosen, self.tile, self.chunk, keys)
        columns, width = key_columns(keys, self.chunk, q.device)
        return BlockLayout.from_block_mask(chosen[..., columns], self.query_block, width, queries, keys)

    def _chosen(self, q: Tensor, k: Tensor, past: Tensor, own: Tensor) -> Tensor:
        """Bool `[B, heads, rows, chunks]` of the heads `q` that share the keys `k` `[B, 1, N, D]`."""
        gates = head_scores(mean_pool(q, self.query_block), mean_pool(k, self.chunk))
        best = (
            gates.masked_fill_(~past, -float("inf")).topk(min(self.topk - 1, past.shape[1]), -1, sorted=False).indices
        )
        chosen = torch.zeros_like(gates, dtype=torch.bool).scatter_(-1, best, value=True)
        return chosen.logical_and_(past).logical_or_(own)
