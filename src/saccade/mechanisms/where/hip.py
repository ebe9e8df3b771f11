"""HiP: a tree search finds the blocks of keys that matter to a block of queries, in O(N log N)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.ops.checks import accumulation_dtype
from saccade.types import BlockLayout, Geometry, Kind, Pattern


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """At N = 8192 about 9, 15, 29 and 50 % of the causal area; one query in 8 and two keys a block are asked."""
    block = min(max(n // 128, 1), 64)
    shared = {"sinks": block, "block_q": 2 * block, "block_k": block}
    shared |= {"query_stride": max(block // 8, 1), "key_stride": max(block // 2, 1)}
    parts = ((64, 64), (32, 32), (11, 22), (6, 11))
    return tuple(shared | {"budget": max(n // found, block), "window": max(n // near, block)} for found, near in parts)


@register(
    "hip",
    Kind.SELECTOR,
    summary="Ranges of keys are halved, and the best halves kept, until they are blocks; plus sinks and a window.",
    papers=("HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",),
    other_papers=(
        "A Training-free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention",
    ),
    year=2024,
    code="DeepAuto-AI/hip-attention",
    patterns=frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="budget >= N",
    complexity="N log N",
    deviations=(
        "The choice is causal at block granularity: the queries of a block share one choice.",
        (
            "Blocks of 64 keys, whose representative is sampled every key_stride tokens, where the authors' kernels "
            "use blocks of 2 keys: block engines are fast on large blocks only."
        ),
        "The window and the sinks grow to whole blocks, the window is that of a block's first query.",
        "All rows are halved equally often, so that a level is one batched step; ranges of one block stay as they are.",
    ),
    example={"budget": 24, "window": 8, "sinks": 4, "block_q": 16, "block_k": 8, "query_stride": 2, "key_stride": 2},
    exact=lambda n: {"budget": n + 16, "block_q": 16, "block_k": 16},
    ladder=_ladder,
)
@dataclass(frozen=True)
class HiP(Selector):
    """The keys before the window of a block of queries I are split evenly into r = budget / block_k ranges.

    Then, until every range is one block: halve every range, score a half by max q_i . k_j over i in I and j in the
    block at the half's centre, and keep the r best of the 2r halves. Those blocks, the sinks and the window are
    attended to. When not causal, all keys after the sinks are searched, and there is no window.

    Args:
        budget: Keys found by the search, in tokens; rounded up to blocks.
        window: Last tokens that every query of a block sees, its own included.
        sinks: First tokens that stay visible.
        block_q: Queries per block.
        block_k: Keys per block.
        query_stride: One query in this many of a block takes part in the search.
        key_stride: One key in this many of a representative block is scored.
    """

    budget: int = 512
    window: int = 256
    sinks: int = 16
    block_q: int = 128
    block_k: int = 64
    query_stride: int = 2
    key_stride: int = 16

    def __post_init__(self) -> None:
        for name in ("budget", "window", "block_q", "block_k", "query_stride", "key_stride"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1 token")
        require(self.sinks >= 0, "sinks", self.sinks, "at least 0 tokens")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """What the search finds, and the blocks of sinks and window."""
        queries, keys = q.shape[2], k.shape[2]
        key_blocks = -(-keys // self.block_k)
        first = torch.arange(0, queries, self.block_q, device=q.device)[:, None] + keys - queries
        start = min(-(-self.sinks // self.block_k), key_blocks)
        if geometry.causal:
            stop = ((first - self.window + 1) // self.block_k).clamp(min=start)
        else:
            stop = torch.full_like(first, key_blocks)
        left, right = self._search(q, k, start, stop)

        columns = torch.arange(key_blocks, device=q.device)
        always = (columns < start) | (columns >= stop)
        if geometry.causal:
            always &= columns * self.block_k < first + self.block_q
        found = torch.zeros(*left.shape[:3], key_blocks + 1, dtype=torch.bool, device=q.device)
        found.scatter_(-1, torch.where(left < right, left, key_blocks), value=True)
        return BlockLayout.from_block_mask(found[..., :-1] | always, self.block_q, self.block_k, queries, keys)

    def _search(self, q: Tensor, k: Tensor, start: int, stop: Tensor) -> tuple[Tensor, Tensor]:
        """Ranges `[left, right)` of at most one block, `[B, H, query_blocks, ranges]` each, in `[start, stop)`."""
        ranges = -(-self.budget // self.block_k)
        borders = start + torch.arange(ranges + 1, device=q.device) * (stop - start) // ranges
        borders = borders.expand(*q.shape[:2], -1, -1)
        left, right = borders[..., :-1], borders[..., 1:]
        widest = -(-int((stop - start).max()) // ranges) if stop.numel() else 0
        asked = self._asked(q)
        for _ in range((widest - 1).bit_length() if widest else 0):
            middle = (left + right + 1) // 2
            left, right = torch.cat([left, middle], -1), torch.cat([middle, right], -1)
            scores = self._score(asked, k, (left + right) // 2).masked_fill(left >= right, -float("inf"))
            best = scores.topk(ranges, -1).indices
            left, right = left.gather(-1, best), right.gather(-1, best)
        return left, right

    def _asked(self, q: Tensor) -> Tensor:
        """The queries that vote for their block, `[B, H, query_blocks, sampled, D]`."""
        first = torch.arange(0, q.shape[2], self.block_q, device=q.device)[:, None]
        rows = first + torch.arange(0, self.block_q, self.query_stride, device=q.device)
        rows = torch.where(rows < q.shape[2], rows, first)  # a ragged block asks its first query again
        return q[:, :, rows].to(accumulation_dtype(q.dtype))

    def _score(self, asked: Tensor, k: Tensor, block: Tensor) -> Tensor:
        """Largest q . k between the asked queries and the sampled keys of each block, shaped as `block`."""
        batch, heads, rows, candidates = block.shape
        groups, keys, dim = k.shape[1:]
        inside = torch.arange(0, self.block_k, self.key_stride, device=k.device)
        first = (block[..., None] * self.block_k).clamp(max=keys - 1)
        token = torch.where(first + inside < keys, first + inside, first)
        source = torch.arange(batch * groups, device=k.device).view(batch, groups).repeat_interleave(heads // groups, 1)
        flat = (token + source[:, :, None, None, None] * keys).view(batch, heads, rows, -1)
        sampled = k.reshape(-1, dim)[flat].to(asked.dtype)
        scores = (asked @ sampled.transpose(-1, -2)).amax(-2)
        return scores.view(batch, heads, rows, candidates, len(inside)).amax(-1)
