"""Grouped-query attention: query heads share key/value heads; multi-query attention is one group."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import ALL_PATTERNS, Heads, require
from saccade.ops.checks import accumulation_dtype
from saccade.types import Kind


@register(
    "gqa",
    Kind.HEADS,
    summary="G key/value heads, each the mean of H / G neighbouring ones; one group is multi-query attention.",
    papers=("Fast Transformer Decoding: One Write-Head is All You Need",),
    other_papers=("GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",),
    year=2019,
    patterns=ALL_PATTERNS,
    supports=frozenset({"backward", "bias", "dropout", "gqa", "lse", "segments", "streaming"}),
    training_free=False,
    exact_when="groups equals the number of key/value heads",
    complexity="N",
    deviations=(
        (
            "The multi-query paper trains one key/value head from scratch; pooling trained heads by their mean is the "
            "grouped-query paper's conversion, which needs some further training to recover quality."
        ),
    ),
    example={"groups": 2},
)
@dataclass(frozen=True)
class GQA(Heads):
    """Group g has the mean of key/value heads g r .. g r + r - 1, r = H / groups.

    Pooling keys and values of every call saves memory in the cache only. To save the projections too, pool them once
    with `pool_projection`, which gives the same keys and values.

    Args:
        groups: Key/value heads that remain; must divide those that come in. 1 is multi-query attention.
    """

    groups: int = 1

    def __post_init__(self) -> None:
        require(self.groups >= 1, "groups", self.groups, "at least 1")

    def share(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, groups, N, D]` and `[B, groups, N, E]` from `[B, H, N, D]` and `[B, H, N, E]`."""
        heads = k.shape[1]
        require(v.shape[1] == heads, "v heads", v.shape[1], f"{heads}, as k")
        self._require_divisor(heads)
        return self._mean(k, 1), self._mean(v, 1)

    def pool_projection(self, weight: Tensor, heads: int) -> Tensor:
        """Key or value projection of `groups` heads from one of `heads`, by mean pooling.

        Args:
            weight: `[heads * D, C]` as in `nn.Linear`, or its bias `[heads * D]`.
            heads: Key/value heads of `weight`.

        Returns:
            `[groups * D, C]` or `[groups * D]`, in the dtype of `weight`.

        Raises:
            ValueError: If `groups` does not divide `heads`, or `heads` the rows of `weight`.
        """
        self._require_divisor(heads)
        require(weight.shape[0] % heads == 0, "weight rows", weight.shape[0], f"a multiple of {heads} heads")
        return self._mean(weight.unflatten(0, (heads, -1)), 0).flatten(0, 1)

    def _require_divisor(self, heads: int) -> None:
        require(heads > 0 and heads % self.groups == 0, "groups", self.groups, f"a divisor of the {heads} heads of k")

    def _mean(self, x: Tensor, dim: int) -> Tensor:
        """Mean over each group along `dim`, accumulated in at least fp32."""
        pooled = x.unflatten(dim, (self.groups, -1)).mean(dim + 1, dtype=accumulation_dtype(x.dtype))
        return pooled.to(x.dtype)
