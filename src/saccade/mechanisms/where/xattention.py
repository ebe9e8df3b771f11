"""XAttention: sums along antidiagonals tell which blocks of the attention matrix matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import ALL_PATTERNS, Selector, require
from saccade.mechanisms.where._blocks import block_visibility
from saccade.ops import attend
from saccade.ops.checks import accumulation_dtype
from saccade.types import BlockLayout, Geometry, Kind


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
        """Estimated attention of each block, `[B, H, query_blocks, key_blocks]`.

        It is exact attention of the groups of queries to the groups of keys, whose values say which block they are in.
        """
        per_block, offset = self.block // self.stride, k.shape[2] - q.shape[2]
        queries, keys, blocks = (
            -(-q.shape[2] // self.stride),
            -(-k.shape[2] // self.stride),
            -(-k.shape[2] // self.block),
        )
        window = None
        if causal:  # group a sees the groups up to a + offset // stride, and the last group of keys may be beyond all
            last = queries + offset // self.stride
            keys = min(keys, max(last, 0))
            window = (-1, last - keys)
        member = torch.arange(keys, device=k.device)[:, None] // per_block == torch.arange(blocks, device=k.device)
        scale, share, parts = q.shape[3] ** -0.5 / self.stride, q.shape[1] // k.shape[1], []
        for head_q, head_k in zip(q.split(share, 1), k.split(1, 1), strict=True):  # one at a time stays in cache
            k_groups = self._groups(head_k).flatten(-2)[:, :, :keys]
            values = member.to(k_groups.dtype).expand(*k_groups.shape[:2], -1, -1)
            parts.append(
                attend(self._groups(head_q).flip(-2).flatten(-2), k_groups, values, window=window, scale=scale)
            )
        weights = torch.cat(parts, 1).nan_to_num(0.0)
        padded = torch.nn.functional.pad(weights, (0, 0, 0, -queries % per_block))
        return padded.unflatten(2, (padded.shape[2] // per_block, per_block)).sum(3)

    def _groups(self, x: Tensor) -> Tensor:
        """Tokens in groups, padded with zeros to a whole one: `[B, heads, groups, stride, D]`, at least fp32."""
        x = x.to(accumulation_dtype(x.dtype))
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % self.stride)) if x.shape[2] % self.stride else x
        return padded.unflatten(2, (padded.shape[2] // self.stride, self.stride))
