"""FlexPrefill: each head takes blocks or vertical and slash lines, as many as the last queries' attention needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._blocks import head_scores, mean_pool
from saccade.mechanisms.where._last_queries import diagonal_sums, last_attention
from saccade.types import BlockLayout, Geometry, Kind, Pattern


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """What each keeps depends on the data."""
    block = min(max(n // 64, 1), 128)
    return tuple({"gamma": gamma, "block": block, "min_budget": 2 * block} for gamma in (0.6, 0.8, 0.9, 0.95))


@register(
    "flex_prefill",
    Kind.SELECTOR,
    summary="Per head, top-p of pooled blocks or of vertical and slash lines, judged by the last block of queries.",
    other_papers=("FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",),
    year=2025,
    code="ByteDance-Seed/FlexPrefill",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    prefill_only=(
        "the last block of queries chooses for all, so that outputs of earlier tokens depend on later ones; only the "
        "last tokens' outputs, and what follows a finished prompt, are meant to be used"
    ),
    training_free=True,
    exact_when="min_budget >= N",
    complexity="N^2",
    deviations=(
        "Slash lines are pooled into blocks from the diagonal on, the authors' from the far end.",
        "The last row of blocks is pooled over its real tokens, the authors' key blocks over padding too.",
    ),
    example={"gamma": 0.5, "tau": 0.2, "block": 16, "min_budget": 16},
    exact=lambda n: {"min_budget": n, "block": 16},
    ladder=_ladder,
)
@dataclass(frozen=True)
class FlexPrefill(Selector):
    """The last `block` queries' attention A is summed over keys (vertical) and over distances (slash).

    A head whose pooled estimate softmax(mean(q_last) . mean(k_block)) is closer than `tau` to A's sums over
    blocks (square root of the Jensen-Shannon divergence) is *query-aware*, the others are *vertical-slash*:

    - query-aware: the largest entries of softmax(mean(Q_i) . mean(K_j) / sqrt(D)), over all rows of blocks together,
      while they sum to at most gamma times the rows, and `min_budget` of the lines below;
    - vertical-slash: as many block columns and block diagonals, the heaviest, as keys and distances are needed to hold
      gamma of A's weight, divided by the block.

    The first column and the main diagonal are always among them. Prompts of at most two blocks, or `min_budget`, are
    dense.

    Args:
        gamma: Attention to hold, in (0, 1].
        tau: Distance below which the pooled estimate is trusted; 0 = never.
        block: Queries and keys per block, and the number of queries that choose.
        min_budget: Least number of tokens in columns and in diagonals.
        max_budget: Largest number; None means no limit.
    """

    gamma: float = 0.95
    tau: float = 0.1
    block: int = 128
    min_budget: int = 1024
    max_budget: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.gamma <= 1, "gamma", self.gamma, "a fraction in (0, 1]")
        require(0 <= self.tau <= 1, "tau", self.tau, "a distance in [0, 1]")
        require(self.block >= 1, "block", self.block, "at least 1 token")
        require(self.min_budget >= 1, "min_budget", self.min_budget, "at least 1 token")
        fits = self.max_budget is None or self.max_budget >= self.min_budget
        require(fits, "max_budget", self.max_budget, f"None or at least min_budget={self.min_budget}")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:  # noqa: ARG002
        """Columns and diagonals of blocks, and for query-aware heads the blocks their pooled scores choose."""
        tokens = k.shape[2]
        blocks = -(-tokens // self.block)
        if tokens <= max(2 * self.block, -(-self.min_budget // self.block) * self.block):
            return BlockLayout.dense(tokens, tokens, block=self.block, device=q.device)
        weights = last_attention(q, k, self.block)
        vertical, slash = weights.mean(2), diagonal_sums(weights) / weights.shape[2]
        columns, diagonals = self._blocks_of(vertical), self._blocks_of(slash)
        pooled = head_scores(mean_pool(q, self.block), mean_pool(k, self.block)) * q.shape[3] ** -0.5
        asked = head_scores(q[:, :, -self.block :].to(pooled.dtype).mean(2, keepdim=True), mean_pool(k, self.block))
        estimate = (asked[:, :, 0] * q.shape[3] ** -0.5).softmax(-1)
        aware = _distance(estimate, columns) < self.tau

        columns[..., 0] = diagonals[..., 0] = float("inf")
        column = _largest(columns, self._count(vertical, blocks, aware))
        diagonal = _largest(diagonals, self._count(slash, blocks, aware))
        row = torch.arange(blocks, device=q.device)
        apart = row[:, None] - row
        kept = column[:, :, None] | diagonal[..., apart.clamp(min=0)]
        if aware.any():
            kept |= aware[..., None, None] & self._query_aware(pooled.masked_fill(apart < 0, -float("inf")))
        return BlockLayout.from_block_mask(kept & (apart >= 0), self.block, self.block, tokens, tokens)

    def _blocks_of(self, sums: Tensor) -> Tensor:
        """`[B, H, N]` summed within blocks: `[B, H, blocks]`."""
        padded = torch.nn.functional.pad(sums, (0, -sums.shape[-1] % self.block))
        return padded.unflatten(-1, (-1, self.block)).sum(-1)

    def _count(self, sums: Tensor, blocks: int, aware: Tensor) -> Tensor:
        """How many blocks hold gamma of `sums` `[B, H, N]`, within the budgets: int64 `[B, H]`."""
        least = -(-self.min_budget // self.block)
        most = blocks if self.max_budget is None else min(-(-self.max_budget // self.block), blocks)
        covered = sums.sort(-1, descending=True).values.cumsum(-1)
        count = ((covered <= self.gamma).sum(-1) + 1) // self.block + 1
        return count.masked_fill(aware, 0).clamp(min=least).clamp(max=most)

    def _query_aware(self, scores: Tensor) -> Tensor:
        """The largest weights of the whole map while they sum to gamma of it: bool `[B, H, blocks, blocks]`."""
        weights = scores.softmax(-1)
        ordered, order = weights.flatten(2).sort(-1, descending=True)
        kept = ordered.cumsum(-1) <= self.gamma * scores.shape[2]
        return torch.zeros_like(kept).scatter_(-1, order, kept).view(scores.shape)


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence along the last dimension, 0 log 0 = 0."""
    middle = (p + q) / 2
    both = torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(middle, middle)
    return (both.sum(-1) / 2).clamp(min=0).sqrt()


def _largest(x: Tensor, count: Tensor) -> Tensor:
    """The `count` `[B, H]` largest entries of each row `[B, H, blocks]`: bool like `x`."""
    rank = torch.arange(x.shape[-1], device=x.device)
    order = x.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order, rank < count[..., None])
