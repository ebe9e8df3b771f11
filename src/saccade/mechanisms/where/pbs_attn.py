"""PBS-Attn: keys are sorted by importance within segments, so that few blocks of keys hold what matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._blocks import head_scores, key_lists, mean_pool
from saccade.ops.checks import accumulation_dtype
from saccade.types import Geometry, Kind, Pattern, TokenIndex


def _ladder(n: int) -> tuple[dict[str, Any], ...]:
    """What each keeps depends on the data."""
    block = min(max(n // 64, 1), 128)
    return tuple({"threshold": tau, "block": block, "segment": 2 * block} for tau in (0.3, 0.5, 0.7, 0.9))


@register(
    "pbs_attn",
    Kind.SELECTOR,
    summary="Keys sorted by importance within causal segments, then top-p of pooled blocks of the sorted keys.",
    papers=("Sparser Block-Sparse Attention via Token Permutation",),
    year=2025,
    code="xinghaow99/pbs-attn",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    prefill_only=(
        "the last block of queries orders the keys for all, so that outputs of earlier tokens depend on later ones; "
        "only the last tokens' outputs, and what follows a finished prompt, are meant to be used"
    ),
    training_free=True,
    exact_when="threshold = 1",
    complexity="N^2",
    deviations=(
        (
            "Keys are not moved: the kept blocks of sorted keys are listed by their places and gathered, which is the "
            "same attention."
        ),
        "Queries are not permuted; neither are they in the authors' code.",
        "Pooled scores are scaled by D^-0.5 whatever `scale` the attention uses.",
    ),
    example={"threshold": 0.6, "block": 16, "segment": 32},
    exact=lambda _: {"threshold": 1.0, "block": 16, "segment": 32},
    ladder=_ladder,
)
@dataclass(frozen=True)
class PBSAttn(Selector):
    """Importance of a key: its attention among those of whole segments, mean over the last `block` queries.

    In each whole segment keys are sorted by falling importance and cut into blocks. A block of queries attends to its
    own segment, to the block that holds the first token, and to the largest of P = softmax(mean(Q_i) . mean(K_j) /
    sqrt(D)) over sorted blocks j of earlier segments, until they hold `threshold` of it.

    Args:
        threshold: Fraction of P that a row keeps.
        block: Queries and sorted keys per block.
        segment: Keys that are sorted together, a multiple of `block`.
        sink: Always keep the block of the first token.
    """

    threshold: float = 0.9
    block: int = 128
    segment: int = 256
    sink: bool = True

    def __post_init__(self) -> None:
        require(0 < self.threshold <= 1, "threshold", self.threshold, "a fraction in (0, 1]")
        require(self.block >= 1, "block", self.block, "at least 1 token")
        fits = self.segment >= 1 and self.segment % self.block == 0
        require(fits, "segment", self.segment, f"a positive multiple of block={self.block}")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> TokenIndex:  # noqa: ARG002
        """A list of keys for each block of queries."""
        tokens = k.shape[2]
        order = self._order(q, k)
        moved = k.repeat_interleave(q.shape[1] // k.shape[1], 1).gather(2, order[..., None].expand_as(q))
        scores = head_scores(mean_pool(q, self.block), mean_pool(moved, self.block)) * q.shape[3] ** -0.5
        segment = torch.arange(scores.shape[2], device=q.device) * self.block // self.segment
        earlier, own = segment[:, None] > segment, segment[:, None] == segment
        kept = self._heaviest(scores.masked_fill(~earlier, -float("inf")).softmax(-1).nan_to_num(0.0))
        if self.sink and tokens:
            sink = (order == 0).int().argmax(-1) // self.block
            kept |= torch.arange(len(segment), device=q.device) == sink[..., None, None]
        kept = (kept & earlier) | own
        by_place = kept[..., torch.arange(tokens, device=q.device) // self.block]
        by_key = torch.zeros_like(by_place).scatter_(-1, order[:, :, None].expand_as(by_place), by_place)
        return TokenIndex(key_lists(by_key), tokens, tokens, group=self.block, causal=True)

    def _order(self, q: Tensor, k: Tensor) -> Tensor:
        """Key at each place of the sorted sequence, int64 `[B, H, N]`."""
        tokens, dtype = k.shape[2], accumulation_dtype(q.dtype)
        whole = tokens // self.segment * self.segment
        order = torch.arange(tokens, device=q.device).expand(*q.shape[:2], -1)
        if whole == 0:
            return order
        asked = q[:, :, -self.block :].to(dtype) * q.shape[3] ** -0.5
        importance = head_scores(asked, k[:, :, :whole].to(dtype)).softmax(-1).mean(2).unflatten(2, (-1, self.segment))
        ranked = importance.argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(0, whole, self.segment, device=q.device)[:, None]
        return torch.cat([(ranked + first).flatten(2), order[..., whole:]], -1)

    def _heaviest(self, weights: Tensor) -> Tensor:
        """The largest entries of each row until they hold `threshold`: bool like `weights`."""
        ordered, order = weights.sort(-1, descending=True)
        kept = (ordered.cumsum(-1) - ordered < self.threshold) | (self.threshold == 1)
        return torch.zeros_like(kept).scatter_(-1, order, kept)
