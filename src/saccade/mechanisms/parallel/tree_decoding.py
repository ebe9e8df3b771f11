"""Tree Attention: each rank attends to its own keys, and one reduction over the ranks joins the partial results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from saccade.catalog import Card, register
from saccade.mechanisms.base import ALL_PATTERNS
from saccade.ops import attend
from saccade.ops.checks import accumulation_dtype, check_qkv
from saccade.types import AttentionOutput, Kind


@register(
    "tree_decoding",
    Kind.PARALLEL,
    summary="Keys and values sharded over ranks; partial softmax results joined by all-reduce.",
    papers=("Tree Attention: Topology-aware Decoding for Long-Context Attention on GPU clusters",),
    year=2024,
    code="Zyphra/tree_attention",
    patterns=ALL_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="always",
    complexity="N",
    deviations=(
        (
            "The shape of the tree is left to the collective library's all-reduce, as in the authors' code. Numerator "
            "and denominator travel in one all-reduce instead of two."
        ),
        "The authors' code has one query and no mask; several queries at the sequence's end and gradients are added.",
    ),
    exact=lambda n: {},  # noqa: ARG005
)
@dataclass(frozen=True)
class TreeDecoding:
    """Exact attention of replicated queries over keys and values that are sharded along the sequence.

    With `(o_r, l_r)` the output and log-sum-exp over the keys of rank r and `m = max_r l_r`:
    `out = sum_r exp(l_r - m) o_r / sum_r exp(l_r - m)`.
    """

    card: ClassVar[Card]
    sharded: ClassVar[tuple[str, ...]] = ("k", "v")
    """The inputs of which each rank holds its part; the others, and then the output, are the same on every rank."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        group: dist.ProcessGroup | None = None,
        causal: bool = False,
        scale: float | None = None,
        return_lse: bool = False,
        impl: str = "auto",
    ) -> Tensor | AttentionOutput:
        """Attend over all ranks' keys; every rank of `group` must call it.

        Gradients are those of one process, provided every rank computes the same loss from the output, as in tensor
        parallelism: `q` gets the whole gradient on every rank, `k` and `v` that of their shard.

        Args:
            q: `[B, H, M, D]`, the same on every rank; with `causal` the last M positions of the whole sequence.
            k: `[B, G, n, D]`, this rank's keys; shards follow each other in rank order, may differ in n and be empty.
            v: `[B, G, n, E]`, their values.
            group: The ranks; None means all.
            causal: Query i sees keys j <= i + N - M of the whole sequence of N keys.
            scale: Factor on q k^T; None means D^-0.5.
            return_lse: Also return the log-sum-exp over all ranks' keys, `[B, H, M]`.
            impl: Implementation of the engine.

        Returns:
            `[B, H, M, E]`, the same on every rank, or `AttentionOutput` with `return_lse`.

        Raises:
            ValueError: If shapes do not fit, or torch.distributed is not initialised.
        """
        check_qkv(q, k, v)
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f"group={group}: torch.distributed is not initialised, expected init_process_group first")
        # Place of the last query minus place of this shard's last key: past the diagonal by so much, all is visible.
        window = (-1, _keys_after(k, group)) if causal and q.shape[2] > 1 else None
        local = attend(_AllReduceGradient.apply(q, group), k, v, window=window, scale=scale, return_lse=True, impl=impl)
        out, lse = _combine(local.out, local.lse, group, accumulation_dtype(q.dtype))  # type: ignore[arg-type]
        return AttentionOutput(out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def _combine(out: Tensor, lse: Tensor, group: dist.ProcessGroup | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Join the ranks' partial results; rows that no rank saw become 0 and -inf."""
    lse = lse.to(dtype)
    top = lse.detach().clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    top = torch.where(top == -torch.inf, 0.0, top)
    unseen = lse == -torch.inf
    weight = torch.where(unseen, 0.0, torch.exp(torch.where(unseen, 0.0, lse) - top))[..., None]
    sums = _AllReduceSum.apply(torch.cat([weight * out.to(dtype), weight], -1), group)
    numerator, denominator = sums[..., :-1], sums[..., -1:]
    empty = denominator == 0
    total = torch.where(empty, 1.0, denominator)
    joint = torch.where(empty, -torch.inf, torch.log(total))[..., 0] + top
    return numerator / total, joint


def _keys_after(k: Tensor, group: dist.ProcessGroup | None) -> int:
    """Keys held by the ranks after this one."""
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=k.device)
    rank = dist.get_rank(group)
    counts[rank] = k.shape[2]
    dist.all_reduce(counts, group=group)
    return int(counts[rank + 1 :].sum())


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; the gradient, the same on every rank, passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # noqa: ARG004
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


class _AllReduceGradient(torch.autograd.Function):
    """The identity on a replicated tensor; its gradient is summed over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
