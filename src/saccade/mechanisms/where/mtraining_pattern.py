"""MTraining's pattern: columns of keys and diagonals of blocks, found in every forward pass by the last queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._blocks import head_scores, key_lists, largest
from saccade.mechanisms.where._last_queries import diagonal_sums
from saccade.ops.checks import accumulation_dtype
from saccade.types import Geometry, Kind, Pattern, TokenIndex


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """Columns and diagonals; what diagonals cost depends on how they bundle."""
    block = min(max(n // 64, 1), 128)
    shared = {"block": block, "sinks": block // 4, "local": block, "last_queries": min(64, max(n // 64, 1))}
    return tuple(shared | {"vertical": n // part, "slash": n // part} for part in (32, 16, 8, 4))


@register(
    "mtraining_pattern",
    Kind.SELECTOR,
    summary="Vertical and slash lines by sums of the last queries' scores, slashes widened to blocks; for training.",
    papers=("MTraining: Distributed Dynamic Sparse Attention for Efficient Ultra-Long Context Training",),
    year=2025,
    code="microsoft/MInference",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    prefill_only=(
        "lines are chosen for all queries by the last ones, so that outputs of earlier tokens depend on later ones, "
        "also in training, as the authors train"
    ),
    training_free=True,
    exact_when="slash >= N",
    complexity="N^2",
    deviations=(
        "The pattern on one device; the balanced and the hierarchical sparse ring attention are not part of it.",
        (
            "One size for all heads of a call; the authors read each head's from an offline search, as for "
            "`minference`, whose lines differ: they are chosen by weights, not scores, and are not widened to blocks."
        ),
        (
            "With mass, a block of queries always keeps its own block of keys, so that no query is left with nothing, "
            "and the most lines are not rounded up to multiples of 128."
        ),
        "A last block that is not full is cut short; the authors' lengths are multiples of the block.",
    ),
    example={"vertical": 8, "slash": 4, "last_queries": 8, "sinks": 2, "local": 4, "block": 16},
    exact=lambda n: {"slash": max(n, 1), "block": 16},
    ladder=_ladder,
)
@dataclass(frozen=True)
class MTrainingPattern(Selector):
    """Let S be the scaled scores of the last `last_queries` queries with the keys they see.

    Kept are the `vertical` keys with the largest sums of S (a key that one of them does not see comes last) and the
    `slash` distances i - j with the largest sums of S along diagonals; a block of queries keeps the blocks of keys that
    such a diagonal crosses, all of them, seen from a block's first query on. With `mass` = (p, p') lines are ranked by
    sums of softmax(S) / last_queries instead, sinks and local lines not forced, and of the best ones as many are kept
    as together hold less than p (columns) and p' (diagonals), at most `vertical` and `slash`.

    Args:
        vertical: Key columns.
        slash: Diagonals.
        mass: Shares of the weights, in (0, 1], or None.
        last_queries: Queries that choose lines.
        sinks: First keys that are always columns; `vertical` is at least this.
        local: Smallest distances that are always diagonals; `slash` is at least this.
        block: Queries and keys per block.
    """

    vertical: int = 1000
    slash: int = 6096
    mass: tuple[float, float] | None = None
    last_queries: int = 64
    sinks: int = 30
    local: int = 100
    block: int = 128

    def __post_init__(self) -> None:
        for name in ("vertical", "sinks", "local"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0 tokens")
        require(self.slash >= 1, "slash", self.slash, "at least 1 diagonal")
        fits = self.mass is None or (len(self.mass) == 2 and all(0 < share <= 1 for share in self.mass))
        require(fits, "mass", self.mass, "two shares in (0, 1], or None")
        require(self.last_queries >= 1, "last_queries", self.last_queries, "at least 1 query")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> TokenIndex:  # noqa: ARG002  always causal
        """One list of keys for each block of queries."""
        tokens, size = k.shape[2], self.block
        rows = -(-tokens // size)
        column, diagonal = self._lines(q, k)
        # A diagonal at distance s crosses, from every block, those floor(s / size) and ceil(s / size) before it.
        distance = torch.arange(tokens, device=q.device)
        near = torch.zeros(*diagonal.shape[:2], rows + 1, dtype=torch.int64, device=q.device)
        for places in (distance // size, -(-distance // size)):
            near.scatter_add_(2, places.expand_as(diagonal), diagonal.long())
        near[..., :1] += self.mass is not None
        block = torch.arange(rows, device=q.device)
        apart = block[:, None] - block
        blocks = (near > 0)[..., apart.clamp(min=0)] & (apart >= 0)
        past = distance < (block[:, None] + 1) * size
        kept = (blocks.repeat_interleave(size, 3)[..., :tokens] | column[:, :, None]) & past
        return TokenIndex(key_lists(kept), tokens, tokens, size, causal=True)

    def _lines(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen keys and distances, bool `[B, H, N]` each."""
        dtype, keys = accumulation_dtype(q.dtype), k.shape[2]
        asked = q[:, :, max(keys - self.last_queries, 0) :].to(dtype) * q.shape[3] ** -0.5
        places = torch.arange(keys - asked.shape[2], keys, device=q.device)
        hidden = torch.arange(keys, device=q.device) > places[:, None]
        scores = head_scores(asked, k.to(dtype)).masked_fill(hidden, -torch.inf)
        if self.mass is not None:
            weights = scores.softmax(-1) / max(asked.shape[2], 1)
            sums = (weights.sum(2), diagonal_sums(weights))
            limits = (self.vertical, self.slash)
            column, diagonal = (_heaviest(*line) for line in zip(sums, self.mass, limits, strict=True))
            return column, diagonal
        vertical, slash = scores.sum(2), diagonal_sums(scores)
        vertical[..., : self.sinks] = torch.inf
        slash[..., : self.local] = torch.inf
        return largest(vertical, max(self.vertical, self.sinks)), largest(slash, max(self.slash, self.local))


def _heaviest(sums: Tensor, share: float, most: int) -> Tensor:
    """The largest entries of `[B, H, N]` that together hold less than `share`, at most `most`: bool."""
    ranked, order = sums.sort(dim=-1, descending=True, stable=True)
    kept = ranked.cumsum(-1) < share
    kept[..., most:] = False
    return torch.zeros_like(kept).scatter_(-1, order, kept)
