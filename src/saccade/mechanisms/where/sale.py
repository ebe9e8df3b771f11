"""SALE: 4-bit products estimate every score; blocks no query needs beside its sink and neighbours are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._blocks import block_visibility, head_scores
from saccade.ops import block_attend
from saccade.ops.checks import accumulation_dtype
from saccade.types import BlockLayout, Geometry, Kind, Pattern

CHUNK_SCORES = 1 << 22
"""Estimated scores that are held at a time."""

LEVELS = 7
"""4-bit integers run from -7 to 7."""


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """What each keeps depends on the data."""
    block = min(max(n // 128, 1), 64)
    shared = {"block_q": block, "block_k": max(block // 2, 1), "local": 2 * block}
    return tuple(shared | {"threshold": tau} for tau in (0.1, 0.03, 0.01, 0.003))


@register(
    "sale",
    Kind.SELECTOR,
    summary="4-bit q k^T estimates each score; a block is computed if one rises above a share of sink and local mass.",
    papers=("SALE : Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling",),
    year=2025,
    code="BirdChristopher/SALE",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="threshold = 0",
    complexity="N^2",
    deviations=(
        "The choice is causal at block granularity: the queries of a block share one choice.",
        (
            "4-bit numbers are held as floats: the estimate costs what a full q k^T costs, where the authors' kernel "
            "makes it cheap."
        ),
        (
            "Keys are centred by the mean of the first key block before they are rounded, the authors' by that of all "
            "keys, which would show a query the future; a shift of all keys changes no attention."
        ),
        "Queries are rounded as they are; the authors centre them too and add the mean's products exactly.",
        "Each token has a scale of its own, the authors' per-token mode; their faster one shares scales among tokens.",
        (
            "Neighbours are whole blocks from `local` tokens before a block of queries on; the authors' kernel rounds "
            "them up to its segments, and is dense up to 1024 tokens."
        ),
        "One threshold for all heads; the authors also calibrate one per head.",
        "Estimated scores are scaled by D^-0.5 whatever `scale` the attention uses.",
    ),
    example={"threshold": 0.05, "block_q": 16, "block_k": 8, "local": 16},
    exact=lambda _: {"threshold": 0.0, "block_q": 16, "block_k": 16, "local": 16},
    ladder=_ladder,
)
@dataclass(frozen=True)
class SALE(Selector):
    """A block of past keys is kept if a query i of the row gives a key j of the block a high relative attention score.

        exp(s_ij) / sum over keys l of the sink and the neighbours of i of exp(q_i . k_l / sqrt(D)) > threshold

    s_ij is q_i . k_j / sqrt(D) with both rounded to 4 bits, round(7 x / max |x|) per token. The sum is exact. The sink
    (the first key block) and the neighbours are always kept.

    Args:
        threshold: Relative attention score a key must exceed; the authors use 0.004.
        block_q: Queries per block.
        block_k: Keys per block.
        local: Tokens before a block of queries that are always kept, in whole blocks.
    """

    threshold: float = 0.004
    block_q: int = 64
    block_k: int = 32
    local: int = 128

    def __post_init__(self) -> None:
        require(self.threshold >= 0, "threshold", self.threshold, "at least 0")
        require(self.block_q >= 1, "block_q", self.block_q, "at least 1 token")
        require(self.block_k >= 1, "block_k", self.block_k, "at least 1 token")
        require(self.local >= 0, "local", self.local, "at least 0 tokens")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """Sink, neighbours, and the blocks of the past that the estimate calls for."""
        queries, keys, block = q.shape[2], k.shape[2], (self.block_q, self.block_k)
        past, edge = block_visibility(queries, keys, block, geometry.causal, q.device)
        first = torch.arange(0, queries, self.block_q, device=q.device)[:, None] + keys - queries
        start = torch.arange(0, keys, self.block_k, device=q.device)
        always = edge | (past & ((start + self.block_k > first - self.local) | (start == 0)))
        if queries == 0 or keys == 0:
            return BlockLayout.from_block_mask(always, *block, queries, keys)
        near = BlockLayout.from_block_mask(always, *block, queries, keys).within(geometry)
        k = k - k[:, :, : self.block_k].mean(2, keepdim=True)
        mass: Any = block_attend(q, k, k[..., :1], near, return_lse=True).lse
        kept = always | (past & self._called_for(q, k, mass))
        return BlockLayout.from_block_mask(kept, *block, queries, keys)

    def _called_for(self, q: Tensor, k: Tensor, mass: Tensor) -> Tensor:
        """Blocks with a relative attention score above the threshold, bool `[B, H, query_blocks, key_blocks]`.

        Args:
            q: `[B, H, M, D]`.
            k: `[B, G, N, D]`, centred.
            mass: Log-sum-exp of each query's sink and neighbours, `[B, H, M]`.

        Returns:
            The blocks, also of the future.
        """
        dtype = accumulation_dtype(q.dtype)
        keys, asked = _rounded(k.to(dtype)), _rounded(q.to(dtype)) * q.shape[3] ** -0.5
        log_threshold = torch.tensor(self.threshold, dtype=dtype, device=q.device).log()
        rows = max(CHUNK_SCORES // (q.shape[0] * q.shape[1] * k.shape[2] * self.block_q), 1) * self.block_q
        parts = []
        for first in range(0, q.shape[2], rows):
            scores = head_scores(asked[:, :, first : first + rows], keys)
            scores = torch.nn.functional.pad(scores, (0, -k.shape[2] % self.block_k), value=-float("inf"))
            above = scores.unflatten(-1, (-1, self.block_k)).amax(-1) - mass[:, :, first : first + rows, None]
            above = torch.nn.functional.pad(above, (0, 0, 0, -above.shape[2] % self.block_q), value=-float("inf"))
            parts.append(above.unflatten(2, (-1, self.block_q)).amax(3) > log_threshold)
        return torch.cat(parts, 2)


def _rounded(x: Tensor) -> Tensor:
    """Each token `[..., D]` at the nearest of 15 levels, -7 to 7 times its largest size over 7."""
    step = x.abs().amax(-1, keepdim=True) / LEVELS
    return (x / step.masked_fill(step == 0, 1.0)).round() * step
