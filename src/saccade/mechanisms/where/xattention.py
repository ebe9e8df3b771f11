"""XAttention: sums along antidiagonals tell which blocks of the attention matrix matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import ALL_PATTERNS, Selector, require
from saccade.mechanisms.where._blocks import block_visibility, head_scores
from saccade.ops.checks import accumulation_dtype
from saccade.types import BlockLayout, Geometry, Kind

CHUNK_SCORES = 1 << 20
"""Group scores that are held at a time."""


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """What each keeps depends on the data: 5 to 17 % of the causal area at the low end."""
    block = min(max(n // 64, 4), 128)
    return tuple({"threshold": tau, "stride": block // 4, "block": block} for tau in (0.75, 0.9, 0.96, 0.99))


@register(
    "xattention",
    Kind.SELECTOR,
    summary="Blocks that hold most of the attention, estimated from sums of scores along antidiagonals.",
    other_papers=("XAttention: Block Sparse Attention with Antidiagonal Scoring",),
    year=2025,
    code="mit-han-lab/x-attention",
    patterns=ALL_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="threshold = 1",
    complexity="N^2",
    deviations=(
        "The choice is causal at block granularity: the queries of a block share one choice.",
        "One threshold for all heads; the authors also search one per head offline.",
        "Pooled scores are scaled by D^-0.5 whatever `scale` the attention uses.",
    ),
    example={"threshold": 0.6, "stride": 4, "block": 16},
    exact=lambda _: {"threshold": 1.0, "stride": 4, "block": 16},
    ladder=_ladder,
)
@dataclass(frozen=True)
class XAttention(Selector):
    """Queries and keys are taken in groups of `stride` = S tokens; groups a of queries and b of keys score.

        s_ab = sum_t q_{aS + S - 1 - t} . k_{bS + t} / (S sqrt(D)),   P = softmax over the groups b in a's past,

    one product of S*D-vectors that touches every row and column of the S x S square. A block's weight is the sum of
    its P. Each row of blocks keeps its first block and those on the diagonal (when causal), then the heaviest, until
    they hold `threshold` of the row's weight.

    Args:
        threshold: Fraction of a row's estimated weight that is kept (tau).
        stride: Tokens per group (S); the estimate costs a fraction 1 / S of q k^T.
        block: Queries and keys per block, a multiple of `stride`.
    """

    threshold: float = 0.9
    stride: int = 16
    block: int = 128

    def __post_init__(self) -> None:
        require(0 < self.threshold <= 1, "threshold", self.threshold, "a fraction in (0, 1]")
        require(self.stride >= 1, "stride", self.stride, "at least 1 token")
        fits = self.block >= 1 and self.block % self.stride == 0
        require(fits, "block", self.block, f"a positive multiple of stride={self.stride}")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """The heaviest blocks of every row, and when causal the first and those on the diagonal."""
        queries, keys, block = q.shape[2], k.shape[2], (self.block, self.block)
        past, edge = block_visibility(queries, keys, block, geometry.causal, q.device)
        weights = self._weights(q, k, geometry.causal).masked_fill(~(past | edge), 0.0)
        kept = edge.clone()
        if geometry.causal and keys:
            kept[:, 0] |= past[:, 0]
        rest, order = weights.masked_fill(kept, 0.0).sort(-1, descending=True)
        before = (weights * kept).sum(-1, keepdim=True) + rest.cumsum(-1) - rest
        needed = (before < self.threshold * weights.sum(-1, keepdim=True)) | (self.threshold == 1)
        heaviest = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, needed)
        return BlockLayout.from_block_mask((heaviest & past) | kept, *block, queries, keys)

    def _weights(self, q: Tensor, k: Tensor, causal: bool) -> Tensor:
        """Estimated attention of each block, `[B, H, query_blocks, key_blocks]`."""
        offset, per_block = k.shape[2] - q.shape[2], self.block // self.stride
        q_groups = self._groups(q).flip(-2).flatten(-2) * (q.shape[3] ** -0.5 / self.stride)
        k_groups = self._groups(k).flatten(-2)
        starts = torch.arange(k_groups.shape[2], device=k.device) * self.stride
        beyond, real = starts >= k.shape[2], -(-q.shape[2] // self.stride)
        step = max(CHUNK_SCORES // max(q.shape[0] * q.shape[1] * len(starts), 1) // per_block, 1) * per_block
        parts = []
        for first in range(0, max(q_groups.shape[2], 1), step):
            rows = q_groups[:, :, first : first + step]
            places = (torch.arange(rows.shape[2], device=q.device) + first) * self.stride + offset
            last = (first + rows.shape[2] - 1) * self.stride + offset  # no row of this chunk sees a block behind it
            seen = min(max(last // self.block + 1, 0) * per_block, len(starts)) if causal else len(starts)
            hidden = beyond[:seen] | (starts[:seen] > places[:, None]) if causal else beyond
            scores = head_scores(rows, k_groups[:, :, :seen])
            weights = scores.masked_fill(hidden, -float("inf")).softmax(-1).nan_to_num(0.0)
            weights[:, :, max(real - first, 0) :] = 0.0
            blocks = (rows.shape[2] // per_block, per_block, seen // per_block, per_block)
            part = weights.view(*weights.shape[:2], *blocks).sum((3, 5))
            parts.append(torch.nn.functional.pad(part, (0, (len(starts) - seen) // per_block)))
        return torch.cat(parts, 2)

    def _groups(self, x: Tensor) -> Tensor:
        """Tokens in groups, padded with zeros to whole blocks: `[B, heads, groups, stride, D]`, at least fp32."""
        x = x.to(accumulation_dtype(x.dtype))
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % self.block))
        return padded.unflatten(2, (padded.shape[2] // self.stride, self.stride))
