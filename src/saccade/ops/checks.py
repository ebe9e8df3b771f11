"""Checks every engine makes before any work is done."""

from __future__ import annotations

import torch
from torch import Tensor


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check shapes, dtypes and devices of queries, keys and values.

    Args:
        q: Floating point `[B, H, M, D]`.
        k: `[B, G, N, D]`, G dividing H, dtype and device of q.
        v: `[B, G, N, E]`, dtype and device of q.

    Raises:
        ValueError: Naming the argument, what it is and what is expected.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} of type {type(tensor).__name__}: expected a tensor")
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}: expected 4 dimensions [batch, heads, tokens, dim]"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} of dtype {tensor.dtype}: expected a floating-point dtype")
    batch, heads, _, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k of shape {tuple(k.shape)}: expected batch {batch} and head dim {dim}, those of q")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v of shape {tuple(v.shape)}: expected {tuple(k.shape[:3])} before the head dim, as k")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k with {k.shape[1]} heads: expected a divisor of q's {heads} heads")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}: expected {q.dtype} on {q.device}, as q")


def check_segments(q: Tensor, k: Tensor, q_segments: Tensor | None, kv_segments: Tensor | None) -> None:
    """Segment ids: int `[B or 1, M]` and `[B or 1, N]`, both or neither."""
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("q_segments and kv_segments: expected both or neither")
    for name, ids, like in (("q_segments", q_segments, q), ("kv_segments", kv_segments, k)):
        if ids is None:
            continue
        if ids.ndim != 2 or ids.shape[0] not in (1, like.shape[0]) or ids.shape[1] != like.shape[2]:
            raise ValueError(f"{name} of shape {tuple(ids.shape)}: expected [{like.shape[0]} or 1, {like.shape[2]}]")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"{name} of dtype {ids.dtype}: expected an integer dtype")


def resolve_scale(scale: float | None, dim: int) -> float:
    """`scale`, or D^-0.5 if None."""
    return dim**-0.5 if scale is None else float(scale)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
