"""InfLLM-V2: compressed keys choose blocks for each query, shared by the heads of a group; short contexts are dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._blocks import head_scores, largest, tiled_layout
from saccade.mechanisms.where._compressed import past_windows, window_means, windows_of_blocks
from saccade.types import BlockLayout, Geometry, Kind, Pattern

CHUNK_SCORES = 1 << 22
"""Scores of compressed keys that are held at a time."""


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """Sparse throughout; the last blocks are a third of what is kept."""
    block = min(max(n // 128, 4) // 4 * 4, 64)
    shared = {"block": block, "kernel": block // 2, "stride": block // 4, "dense_below": 0}
    counts = (max(3, round(n / block * kept)) for kept in (0.04, 0.08, 0.14, 0.27))
    return tuple(shared | {"topk": count, "local_blocks": count // 3} for count in counts)


@register(
    "infllm_v2",
    Kind.SELECTOR,
    summary="Dense for short contexts, beyond them top-k blocks by compressed keys, with first and last blocks kept.",
    papers=("InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation",),
    year=2025,
    code="OpenBMB/infllmv2_cuda_impl",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse", "streaming"}),
    heads_share=True,
    training_free=True,
    exact_when="topk >= N / block",
    complexity="N^2",
    deviations=(
        (
            "The switch goes by the keys a query sees, the authors' by the length of the call: so a prompt gives the "
            "same whole, in chunks and step by step, and the first dense_below tokens of a long one are dense."
        ),
        "The softmax over compressed keys is exact; the authors' kernel takes its sum from keys four times coarser.",
        (
            "Each query attends to its choice exactly, but a block engine computes, for each tile of queries, the "
            "union of what they chose, and masks."
        ),
        "Pooled scores are scaled by D^-0.5 whatever `scale` the attention uses.",
    ),
    example={"block": 16, "kernel": 8, "stride": 4, "topk": 3, "local_blocks": 1, "dense_below": 24, "tile": 16},
    exact=lambda n: {"topk": -(-n // 16), "block": 16, "kernel": 8, "stride": 4, "dense_below": 0, "tile": 16},
    ladder=_ladder,
)
@dataclass(frozen=True)
class InfLLMV2(Selector):
    """Windows of `kernel` keys, one every `stride`, are compressed to their mean; a query sees those in its past.

        p_w = softmax over seen w of q . mean(k_j for j in w) / sqrt(D),   P_c = max over w that meet c of sum p_w,

    the sum over the query heads of a key/value head, which share their choice. A query keeps the first `init_blocks`
    blocks, its own and the `local_blocks` before, and the blocks c with the largest P_c: `topk` in all, or all of those
    that are always kept if they are more.

    Args:
        block: Keys per block, a multiple of `stride`.
        kernel: Keys per compressed key, a multiple of `stride` and at most block + stride.
        stride: Keys from one compressed key to the next.
        topk: Blocks a query attends to.
        init_blocks: First blocks that are always kept.
        local_blocks: Blocks before a query's own that are always kept.
        dense_below: A query that sees at most this many keys attends to all of them.
        tile: Queries per block of the layout: changes the work, never the result.
    """

    block: int = 64
    kernel: int = 32
    stride: int = 16
    topk: int = 64
    init_blocks: int = 1
    local_blocks: int = 32
    dense_below: int = 8192
    tile: int = 64

    def __post_init__(self) -> None:
        require(self.stride >= 1, "stride", self.stride, "at least 1 token")
        fits = self.block >= 1 and self.block % self.stride == 0
        require(fits, "block", self.block, f"a positive multiple of stride={self.stride}")
        fits = self.stride <= self.kernel <= self.block + self.stride and self.kernel % self.stride == 0
        require(fits, "kernel", self.kernel, f"a multiple of stride={self.stride} up to {self.block + self.stride}")
        require(self.topk >= 1, "topk", self.topk, "at least 1 block")
        require(self.init_blocks >= 0, "init_blocks", self.init_blocks, "at least 0 blocks")
        require(self.local_blocks >= 0, "local_blocks", self.local_blocks, "at least 0 blocks")
        require(self.dense_below >= 0, "dense_below", self.dense_below, "at least 0 tokens")
        require(self.tile >= 1, "tile", self.tile, "at least 1 query")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:  # noqa: ARG002
        """Each query's blocks, in chunks of queries."""
        queries, keys = q.shape[2], k.shape[2]
        if keys <= self.dense_below:
            return BlockLayout.dense(queries, keys, block=self.block, device=q.device)
        compressed = window_means(k, self.kernel, self.stride)
        per_query = q.shape[0] * q.shape[1] * max(compressed.shape[2], -(-keys // self.block))
        step = max(CHUNK_SCORES // max(per_query, 1), 1)
        places = torch.arange(keys - queries, keys, device=q.device)
        parts = [
            self._choose(q[:, :, first : first + step], compressed, places[first : first + step], keys)
            for first in range(0, max(queries, 1), step)
        ]
        chosen = torch.cat(parts, 2).repeat_interleave(q.shape[1] // k.shape[1], 1)
        return tiled_layout(chosen, self.tile, self.block, keys)

    def _choose(self, q: Tensor, compressed: Tensor, places: Tensor, keys: int) -> Tensor:
        """Bool `[B, G, M, blocks]` for the queries at `places`."""
        seen = past_windows(places, compressed.shape[2], self.kernel, self.stride)
        scores = head_scores(q.to(compressed.dtype), compressed) * q.shape[3] ** -0.5
        weights = scores.masked_fill(~seen, -float("inf")).softmax(-1).nan_to_num(0.0)
        weights = weights.unflatten(1, (compressed.shape[1], -1)).sum(2)
        block = torch.arange(-(-keys // self.block), device=q.device)
        own = (places // self.block)[:, None]
        always = (block < self.init_blocks) | (block >= own - self.local_blocks)
        met = windows_of_blocks(weights, len(block), self.block, self.kernel, self.stride)
        best = met.amax(-1).masked_fill(always, float("inf"))
        # One window may be the best of two blocks, so ties are common.
        best = largest(best.masked_fill(block > own, -float("inf")), self.topk)
        return (best | always | (places < self.dense_below)[:, None]) & (block <= own)
