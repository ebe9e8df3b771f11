"""MInference: each head has one of three patterns, found offline; where its lines or blocks lie is found per prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import PLAIN, Selector, require
from saccade.mechanisms.where._blocks import head_scores, key_lists, largest, mean_pool
from saccade.mechanisms.where._last_queries import diagonal_sums, last_attention
from saccade.mechanisms.where._static import first_tokens
from saccade.ops import attend
from saccade.types import BlockLayout, Geometry, Kind, Pattern, TokenIndex

CANDIDATES: tuple[dict[str, Any], ...] = (
    {"form": "a_shape", "vertical": 100, "slash": 800},
    {"form": "vertical_slash", "vertical": 30, "slash": 800},
    {"form": "vertical_slash", "vertical": 100, "slash": 750},
    {"form": "vertical_slash", "vertical": 500, "slash": 700},
    {"form": "vertical_slash", "vertical": 3500, "slash": 100},
    {"form": "vertical_slash", "vertical": 1000, "slash": 4096},
    {"form": "block", "topk": 100},
)
"""What the authors' search tries for each head."""


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """Vertical and slash lines; what slash lines cost depends on how they bundle."""
    block = min(max(n // 64, 1), 64)
    shared = {"form": "vertical_slash", "block": block, "sinks": block // 4, "local": block, "last_queries": block}
    return tuple(shared | {"vertical": n // part, "slash": n // part} for part in (64, 32, 16, 8))


@register(
    "minference",
    Kind.SELECTOR,
    summary="Per head an A-shape, vertical and slash lines found by the last queries, or top-k pooled blocks.",
    other_papers=("MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",),
    year=2024,
    code="microsoft/MInference",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    prefill_only=(
        "vertical and slash lines are chosen for all queries by the last ones, so that outputs of earlier tokens "
        "depend on later ones; only the last tokens' outputs, and what follows a finished prompt, are meant to be used"
    ),
    training_free=True,
    exact_when='form="a_shape", slash >= N',
    complexity="N^2",
    deviations=(
        (
            "One form for all heads of a call; `search_heads` finds each head's, and a recipe gives heads their own. "
            "The form a_shape is `sink_window`, which may be used beyond prefill."
        ),
        (
            "A slash line keeps, for a block of queries, the keys it crosses and no more; the authors' kernel merges "
            "neighbouring lines into runs of whole blocks, a few keys more."
        ),
        "slash is at least local; the authors' code allows half of it, and then ties decide which of them are kept.",
        "Blocks are pooled over their real tokens, the authors' last one over padding too.",
    ),
    example={
        "form": "vertical_slash",
        "vertical": 8,
        "slash": 4,
        "last_queries": 8,
        "sinks": 2,
        "local": 4,
        "block": 16,
    },
    exact=lambda n: {"form": "a_shape", "slash": n, "block": 16},
    ladder=_ladder,
)
@dataclass(frozen=True)
class MInference(Selector):
    """Three forms of sparse causal attention.

    - `a_shape`: the first `vertical` tokens and a window of `slash` tokens.
    - `vertical_slash`: the `vertical` keys with the largest sums of A, the attention of the last `last_queries`
      queries, and the `slash` distances with the largest sums of A along diagonals; a block of queries keeps the keys
      at such a distance from any query of the block.
    - `block`: each block of queries keeps the `topk` key blocks with the largest mean(Q_i) . mean(K_j).

    Args:
        form: Which.
        vertical: Key columns.
        slash: Diagonals, or the window.
        topk: Blocks of the form `block`.
        last_queries: Queries that choose lines.
        sinks: First keys that are always columns; `vertical` is at least this.
        local: Smallest distances that are always diagonals; `slash` is at least this.
        block: Queries (and keys) per block.
    """

    form: Literal["a_shape", "vertical_slash", "block"] = "vertical_slash"
    vertical: int = 1000
    slash: int = 6096
    topk: int = 100
    last_queries: int = 64
    sinks: int = 30
    local: int = 100
    block: int = 64

    def __post_init__(self) -> None:
        forms = ("a_shape", "vertical_slash", "block")
        require(self.form in forms, "form", self.form, f"one of {forms}")
        for name in ("vertical", "sinks", "local"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0 tokens")
        require(self.slash >= 1, "slash", self.slash, "at least 1 token")
        require(self.topk >= 1, "topk", self.topk, "at least 1 block")
        require(self.last_queries >= 1, "last_queries", self.last_queries, "at least 1 query")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout | TokenIndex:
        """The pairs of the chosen form."""
        tokens = k.shape[2]
        if self.form == "a_shape" or tokens == 0:
            near = BlockLayout.window(tokens, tokens, self.slash - 1, 0, block=self.block, device=q.device)
            return near | first_tokens(self.vertical, tokens, tokens, geometry, self.block, q.device)
        if self.form == "block":
            return self._top_blocks(q, k)
        return self._lines(q, k)

    def _top_blocks(self, q: Tensor, k: Tensor) -> BlockLayout:
        """Top-k pooled blocks of every row."""
        scores = head_scores(mean_pool(q, self.block), mean_pool(k, self.block))
        past = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        kept = largest(scores.masked_fill(~past, -float("inf")), self.topk) & past
        return BlockLayout.from_block_mask(kept, self.block, self.block, q.shape[2], k.shape[2])

    def _lines(self, q: Tensor, k: Tensor) -> TokenIndex:
        """One list of keys for each block of queries: the columns, and what the diagonals cross."""
        tokens = k.shape[2]
        weights = last_attention(q, k, self.last_queries)
        vertical, slash = weights.sum(2), diagonal_sums(weights)
        vertical[..., : self.sinks] = float("inf")
        slash[..., : self.local] = float("inf")
        column = largest(vertical, max(self.vertical, self.sinks))
        diagonal = largest(slash, max(self.slash, self.local))
        first = torch.arange(0, tokens, self.block, device=q.device)[:, None]
        past = torch.arange(tokens, device=q.device) < first + self.block
        kept = (self._crossed(diagonal) | column[:, :, None]) & past
        return TokenIndex(key_lists(kept), tokens, tokens, self.block, causal=True)

    def _crossed(self, diagonal: Tensor) -> Tensor:
        """Keys j for which one of the distances first - j ... first - j + block - 1 is marked: bool `[B, H, rows, N]`.

        It depends on first - j alone: a row is a window of one sequence, and the row above it begins `block` later.
        """
        tokens, size = diagonal.shape[-1], self.block
        rows = -(-tokens // size)
        marks = torch.nn.functional.pad(diagonal.int(), (size - 1, rows * size - tokens)).cumsum(-1)
        before = torch.nn.functional.pad(marks, (1, 0))
        near_to_far = (before[..., size:] > before[..., :-size]).flip(-1)
        return torch.nn.functional.pad(near_to_far, (0, tokens - size)).unfold(-1, tokens, size).flip(2)


def search_heads(
    q: Tensor, k: Tensor, v: Tensor, candidates: tuple[dict[str, Any], ...] = CANDIDATES, scale: float | None = None
) -> list[dict[str, Any]]:
    """The settings for each head whose output is nearest to dense attention's: the authors' offline head search.

    Candidates are meant to cost alike; on one long prompt of the model, layer by layer, this is done once.

    Args:
        q: `[B, H, N, D]` of one layer.
        k: `[B, G, N, D]`.
        v: `[B, G, N, E]`.
        candidates: Settings of `MInference`.
        scale: Factor on q k^T; None means D^-0.5.

    Returns:
        The best candidate for each of the H query heads, by the sum of squared differences.

    Raises:
        ValueError: If there are no candidates.
    """
    require(len(candidates) > 0, "candidates", candidates, "at least one dict of settings")
    geometry = PLAIN.replace(causal=True)
    dense = attend(q, k, v, causal=True, scale=scale)
    errors = [
        (MInference(**settings)(q, k, v, geometry=geometry, scale=scale) - dense).float().square().sum((0, 2, 3))
        for settings in candidates
    ]
    return [dict(candidates[best]) for best in torch.stack(errors).argmin(0).tolist()]
