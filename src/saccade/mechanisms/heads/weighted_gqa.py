"""Weighted grouped-query attention: a group's key/value head is a learned weighted sum instead of a mean."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import ALL_PATTERNS, Heads, require
from saccade.ops.checks import accumulation_dtype
from saccade.types import Kind

Weighting = Literal["scalar", "column", "row"]


@register(
    "weighted_gqa",
    Kind.HEADS,
    summary="G key/value heads, each a learned weighted sum of H / G neighbouring ones, folded away after training.",
    papers=("Weighted Grouped Query Attention in Transformers",),
    other_papers=("GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",),
    year=2024,
    patterns=ALL_PATTERNS,
    supports=frozenset({"backward", "bias", "dropout", "lse", "segments", "streaming"}),
    training_free=False,
    exact_when="groups equals the number of key/value heads and the weights are the initial ones",
    complexity="N",
    deviations=(
        (
            "Row weights act on the model's channels, before the projection, so they exist for `fold` only; `share` "
            "refuses them."
        ),
        "Written from the paper's description; the authors' code was not available to read.",
    ),
    example={"heads": 4, "groups": 2},
)
class WeightedGQA(Heads, nn.Module):
    """Key of group g = sum over its heads h of weight_h * k_h, values likewise with weights of their own.

    The weights start at groups / heads, the mean of plain GQA, and are not constrained. During fine-tuning `share`
    pools keys and values (or `fold`, which is differentiable, the projections); afterwards `fold` the
    projections once and run them as plain GQA: the same keys and values at no extra cost.

    Args:
        heads: H, key/value heads that come in.
        groups: G, key/value heads that remain; divides `heads`.
        weighting: One weight per head ("scalar", WGQA), per head and head channel ("column"), or per head and channel
            of the model ("row").
        head_dim: D of keys, needed for "column".
        value_dim: E of values; None means `head_dim`.
        model_dim: C, needed for "row".
        device: Of the weights.
        dtype: Of the weights.
    """

    def __init__(
        self,
        heads: int,
        groups: int,
        weighting: Weighting = "scalar",
        head_dim: int | None = None,
        value_dim: int | None = None,
        model_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(heads >= 1, "heads", heads, "at least 1")
        require(groups >= 1 and heads % groups == 0, "groups", groups, f"a divisor of heads={heads}")
        require(weighting in get_args(Weighting), "weighting", weighting, f"one of {get_args(Weighting)}")
        require(
            (head_dim is not None) == (weighting == "column"),
            "head_dim",
            head_dim,
            'a size exactly with weighting="column"',
        )
        require(value_dim is None or weighting == "column", "value_dim", value_dim, 'None unless weighting="column"')
        require(
            (model_dim is not None) == (weighting == "row"),
            "model_dim",
            model_dim,
            'a size exactly with weighting="row"',
        )
        self.heads, self.groups, self.weighting = heads, groups, weighting
        size = head_dim if model_dim is None else model_dim
        sizes = () if size is None else (size,)
        value_sizes = sizes if value_dim is None else (value_dim,)
        self.key_weight = nn.Parameter(torch.empty(heads, *sizes, device=device, dtype=dtype))
        self.value_weight = nn.Parameter(torch.empty(heads, *value_sizes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at the mean of plain GQA."""
        nn.init.constant_(self.key_weight, self.groups / self.heads)
        nn.init.constant_(self.value_weight, self.groups / self.heads)

    def share(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, G, N, D]` and `[B, G, N, E]` from `[B, H, N, D]` and `[B, H, N, E]`."""
        if self.weighting == "row":
            raise ValueError(
                'weighting="row": its weights act before the projection, expected `fold` instead of `share`'
            )
        require(k.shape[1] == self.heads, "k heads", k.shape[1], f"heads={self.heads}")
        require(v.shape[1] == self.heads, "v heads", v.shape[1], f"heads={self.heads}")
        return self._pool(k, self.key_weight), self._pool(v, self.value_weight)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`share`."""
        return self.share(k, v)

    def fold(self, weight: Tensor, which: Literal["key", "value"]) -> Tensor:
        """Projection of G heads that gives what `share` gives, from one of H heads. Differentiable.

        Args:
            weight: `[H * D, C]` as in `nn.Linear`, or, but for "row", its bias `[H * D]`.
            which: Whether it projects keys or values.

        Returns:
            `[G * D, C]` or `[G * D]`, in the dtype of `weight`.

        Raises:
            ValueError: If `weight` does not fit the weights.
        """
        require(which in ("key", "value"), "which", which, "'key' or 'value'")
        learned = self.key_weight if which == "key" else self.value_weight
        row = self.weighting == "row"
        require(weight.ndim == 2 or (weight.ndim == 1 and not row), "weight dims", weight.ndim, "2, or 1 for a bias")
        require(weight.shape[0] % self.heads == 0, "weight rows", weight.shape[0], f"a multiple of {self.heads} heads")
        per_head = weight.unflatten(0, (self.heads, -1))
        if self.weighting != "scalar":
            size = weight.shape[1] if row else per_head.shape[1]
            require(size == learned.shape[1], "weight channels per head", size, f"{learned.shape[1]}")
        # [1, H, D, C]: the head axis second and, but for rows, the head channels last, as in keys
        stacked = per_head[None] if row else per_head.reshape(self.heads, per_head.shape[1], -1).mT[None]
        pooled = self._pool(stacked, learned)[0]
        return pooled.flatten(0, 1) if row else pooled.mT.reshape(-1, *weight.shape[1:])

    def _pool(self, x: Tensor, learned: Tensor) -> Tensor:
        """Weighted sums `[B, G, n, d]` of `[B, H, n, d]`, accumulated in at least fp32."""
        accumulate = accumulation_dtype(x.dtype)
        weights = learned.to(accumulate)
        weights = weights[:, None, None] if weights.ndim == 1 else weights[:, None]
        return (x.to(accumulate) * weights).unflatten(1, (self.groups, -1)).sum(2).to(x.dtype)
