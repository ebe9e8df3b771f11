"""SpargeAttn: pooled blocks predict the attention map, and the blocks that hold most of its mass are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import ALL_PATTERNS, PLAIN, Selector, require
from saccade.mechanisms.where._blocks import block_visibility, head_scores, mean_direction, mean_pool
from saccade.mechanisms.where._orders import hilbert_order
from saccade.types import AttentionOutput, BlockLayout, Geometry, Kind


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """The authors' top-k form with a sink; at N = 8192 about 9, 16, 26 and 48 % of the causal area."""
    block = min(max(n // 128, 1), 64)
    return tuple(
        {"topk": kept, "similarity": -1.0, "sink": True, "block_q": 2 * block, "block_k": block}
        for kept in (0.035, 0.07, 0.13, 0.27)
    )


@register(
    "sparge",
    Kind.SELECTOR,
    summary="Mean-pooled queries and keys predict the block attention map; blocks too varied to pool are computed.",
    papers=("SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference",),
    year=2025,
    code="thu-ml/SpargeAttn",
    patterns=ALL_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="cdf = 1",
    complexity="N^2",
    deviations=(
        "The choice is causal at block granularity: the queries of a block share one choice.",
        (
            "Blocks on the diagonal are kept without being scored, so their mass does not count towards cdf; the "
            "authors score them with a mean over keys that some queries of the block may not see."
        ),
        (
            "The second stage, skipping P V where a row's maximum lies far below the running one, is a kernel-level "
            "skip and not in the engines; neither is the quantisation of Q and K."
        ),
        (
            "Keys are not centred before their self-similarity is measured (the authors' smooth_k): the mean over all "
            "keys would show a query the future."
        ),
        "Pooled scores are scaled by D^-0.5 whatever `scale` the attention uses.",
    ),
    example={"cdf": 0.5, "similarity": 0.06, "block_q": 16, "block_k": 8},
    exact=lambda _: {"cdf": 1.0, "block_q": 16, "block_k": 16},
    ladder=_ladder,
)
@dataclass(frozen=True)
class Sparge(Selector):
    """P = softmax(mean(Q_i) . mean(K_j) / sqrt(D)) over self-similar blocks j; each row i keeps the top of P.

    The self-similarity of a block is the mean cosine between its tokens, pairs with themselves included. Rows and
    columns of blocks below `similarity` are kept whole: their mean does not stand for them.

    With `geometry.grid` and no causality, calling the mechanism first puts the grid's tokens in Hilbert-curve order,
    so that blocks hold neighbours, and undoes it at the end; blocks with prefix or suffix tokens are kept whole.
    `pattern` is in the order of the tokens it is given.

    Args:
        cdf: Mass of P that a row keeps (tau): its largest blocks while their cumulative sum is at most cdf.
        topk: Instead of `cdf`: fraction of all key blocks that a row keeps.
        similarity: Self-similarity (theta) up to which a block counts as too varied to pool; -1 = none is.
        block_q: Queries per block.
        block_k: Keys per block.
        sink: Always keep the first key block.
        hilbert: Reorder grids along a Hilbert curve.
    """

    cdf: float = 0.98
    topk: float | None = None
    similarity: float = 0.6
    block_q: int = 128
    block_k: int = 64
    sink: bool = False
    hilbert: bool = True

    def __post_init__(self) -> None:
        require(0 < self.cdf <= 1, "cdf", self.cdf, "a fraction in (0, 1]")
        require(self.topk is None or 0 < self.topk <= 1, "topk", self.topk, "None or a fraction in (0, 1]")
        require(-1 <= self.similarity <= 1, "similarity", self.similarity, "a cosine in [-1, 1]")
        require(self.block_q >= 1, "block_q", self.block_q, "at least 1 token")
        require(self.block_k >= 1, "block_k", self.block_k, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """Blocks on the diagonal, blocks too varied to pool, and the top of the predicted map."""
        queries, keys, block = q.shape[2], k.shape[2], (self.block_q, self.block_k)
        past, edge = block_visibility(queries, keys, block, geometry.causal, q.device)
        varied_q = self._varied(q, self.block_q, geometry)[..., None]
        varied_k = self._varied(k, self.block_k, geometry).repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
        scores = head_scores(mean_pool(q, self.block_q), mean_pool(k, self.block_k)) * q.shape[3] ** -0.5
        scored = past & ~varied_k
        predicted = scores.masked_fill(~scored, -float("inf")).softmax(-1).nan_to_num(0.0)
        kept = (self._top(predicted) & scored) | (past & (varied_q | varied_k)) | edge
        if self.sink and keys:
            kept[..., 0] |= past[:, 0]
        return BlockLayout.from_block_mask(kept, *block, queries, keys)

    def _varied(self, x: Tensor, size: int, geometry: Geometry) -> Tensor:
        """Blocks whose tokens do not resemble each other, or lie outside the grid: bool `[B, heads, blocks]`."""
        varied = (
            mean_direction(x, size).square().sum(-1) <= self.similarity
        )  # |mean direction|^2 = mean of all pairs' cosines
        if geometry.prefix:
            varied[..., : -(-geometry.prefix // size)] = True
        if geometry.suffix:
            varied[..., (x.shape[2] - geometry.suffix) // size :] = True
        return varied

    def _top(self, predicted: Tensor) -> Tensor:
        """The first blocks of each row in falling order, at least one: bool like `predicted`."""
        ordered, order = predicted.sort(-1, descending=True)
        if self.topk is not None:
            first = torch.arange(order.shape[-1], device=order.device) < max(1, int(self.topk * order.shape[-1]))
            first = first.expand_as(ordered)
        else:
            first = (ordered.cumsum(-1) <= self.cdf) | (self.cdf == 1)
            first[..., :1] = True
        return torch.zeros_like(predicted, dtype=torch.bool).scatter_(-1, order, first)

    def __call__(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, **options: Any
    ) -> Tensor | AttentionOutput:  # fmt: skip
        """As for every selector; see the class for grids."""
        if geometry.grid is None or geometry.causal or not self.hilbert:
            return super().__call__(q, k, v, geometry=geometry, **options)
        tokens = geometry.prefix + math.prod(geometry.grid) + geometry.suffix
        if not q.shape[2] == k.shape[2] == tokens:
            raise ValueError(
                f"grid={geometry.grid} with prefix={geometry.prefix}, suffix={geometry.suffix}: expected {tokens} "
                f"queries and keys, got {q.shape[2]} and {k.shape[2]}"
            )
        order = torch.arange(tokens, device=q.device)
        order[geometry.prefix : tokens - geometry.suffix] = hilbert_order(geometry.grid, q.device) + geometry.prefix
        moved = (x.index_select(2, order) for x in (q, k, v))
        result = super().__call__(*moved, geometry=geometry, **options)
        back = order.argsort()
        if isinstance(result, Tensor):
            return result.index_select(2, back)
        return AttentionOutput(result.out.index_select(2, back), result.lse.index_select(2, back))
