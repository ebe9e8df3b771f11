"""DHSA: chunks of any length, found by a boundary predictor, are scored as wholes and choose a query block's keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._blocks import key_lists, largest, mean_pool
from saccade.mechanisms.where._boundaries import BoundaryPredictor, pick_boundaries
from saccade.ops.checks import accumulation_dtype
from saccade.types import Geometry, Kind, Pattern, TokenIndex


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """At N = 8192 about 12, 23, 43 and 75 % of the causal area."""
    block = min(max(n // 128, 1), 64)
    shared = {"block": block, "chunks_per_block": max(block // 8, 1)}
    return tuple(shared | {"budget": n // part, "local": min(128, max(n // (4 * part), 1))} for part in (16, 8, 4, 2))


@register(
    "dhsa",
    Kind.SELECTOR,
    summary="Variable-length chunks by predicted boundaries, scored by length-normalised means, choose the keys.",
    papers=("Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",),
    year=2025,
    code="xiongsiheng/DHSA",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    prefill_only=(
        "boundaries are the best of a whole prompt, and a chunk is scored by all its keys, so that outputs of earlier "
        "tokens depend on later ones; the authors use it in prefill"
    ),
    training_free=True,
    exact_when="budget >= N",
    complexity="N^2",
    deviations=(
        (
            "The authors publish no weights of their boundary predictor: train a `BoundaryPredictor` on "
            "`boundary_ratios`, or leave it out, and chunks are even."
        ),
        "The last tokens of a prompt (the authors' instruction) are not treated apart, nor are sliding-window layers.",
        "The authors' later form, rectangular blocks and a learned budget, is another algorithm and not here.",
    ),
    example={"budget": 40, "local": 8, "block": 64, "chunks_per_block": 8},
    exact=lambda n: {"budget": n, "local": 16, "block": 16, "chunks_per_block": 4},
    ladder=_ladder,
)
@dataclass(frozen=True)
class DHSA(Selector):
    """A block of queries I and a chunk of keys C score sqrt(|C|) mean(k_j, j in C) . mean(q_i, i in I).

    Queries and keys are means over heads, so that all heads share the choice. The score of a chunk is that of each of
    its keys. A block of queries keeps the last `local` keys up to its end, and the best others, `budget` in all; within
    a chunk that fits in part, its first keys.

    A predictor's boundaries: the places with the highest logits above `theta`, each more than `apart` from better ones,
    `chunks_per_block` for each `block` of the prompt.

    Args:
        budget: Keys that a block of queries keeps.
        local: Last keys, up to the end of a block of queries, that are always kept.
        block: Queries per block.
        chunks_per_block: Chunks for each `block` of tokens.
        theta: Least logit of a boundary.
        apart: Places next to a boundary that are none.
        predictor: A trained `BoundaryPredictor`; None means even chunks.
    """

    budget: int = 1024
    local: int = 128
    block: int = 64
    chunks_per_block: int = 8
    theta: float = 1.1
    apart: int = 8
    predictor: BoundaryPredictor | None = None

    def __post_init__(self) -> None:
        require(self.budget >= 1, "budget", self.budget, "at least 1 key")
        require(0 <= self.local <= self.budget, "local", self.local, f"from 0 to budget={self.budget} keys")
        require(self.block >= 1, "block", self.block, "at least 1 query")
        fits = 1 <= self.chunks_per_block <= self.block
        require(fits, "chunks_per_block", self.chunks_per_block, f"from 1 to block={self.block}")
        require(self.apart >= 0, "apart", self.apart, "at least 0 tokens")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> TokenIndex:  # noqa: ARG002
        """A list of keys for each block of queries, for all heads."""
        tokens, dtype = k.shape[2], accumulation_dtype(q.dtype)
        chunk = self.chunks(k)
        sums = torch.zeros(len(k), tokens, k.shape[3], dtype=dtype, device=k.device)
        mean_key = k.to(dtype).mean(1)
        sums = sums.scatter_add(1, chunk[..., None].expand_as(mean_key), mean_key)
        sizes = torch.zeros_like(sums[..., 0]).scatter_add(1, chunk, torch.ones_like(mean_key[..., 0]))
        pooled = sums * sizes.clamp(min=1)[..., None].rsqrt()  # the mean times the root of the size
        scores = mean_pool(q.to(dtype).mean(1, keepdim=True), self.block)[:, 0] @ pooled.transpose(1, 2)
        scores = scores.gather(2, chunk[:, None].expand(-1, scores.shape[1], -1))

        stop = (torch.arange(0, tokens, self.block, device=q.device)[:, None] + self.block).clamp(max=tokens)
        key = torch.arange(tokens, device=q.device)
        recent = (key >= stop - self.local) & (key < stop)
        scores = scores.masked_fill(recent, float("inf")).masked_fill(key >= stop, -float("inf"))
        kept = largest(scores, self.budget) & (key < stop)
        return TokenIndex(key_lists(kept[:, None]), tokens, tokens, group=self.block, causal=True)

    def chunks(self, k: Tensor) -> Tensor:
        """The chunk of each key, ascending from 0: int64 `[B, N]` for k `[B, G, N, D]`."""
        tokens = k.shape[2]
        if self.predictor is None:
            even = torch.arange(tokens, device=k.device) * self.chunks_per_block // self.block
            return even.expand(len(k), -1)
        with torch.no_grad():
            logits = self.predictor(k)
        window = self.predictor.window
        place = torch.arange(tokens, device=k.device)
        logits = logits.masked_fill((place < window - 1) | (place >= tokens - window), -float("inf"))
        count = tokens // self.block * self.chunks_per_block
        ends = pick_boundaries(logits, count, self.theta, self.apart)
        return ends.cumsum(-1) - ends.long()
