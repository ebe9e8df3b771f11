"""The gradients of softmax attention on the C++ engine: `problem_backward.hpp` as ctypes, and the call."""

from __future__ import annotations

import ctypes
from typing import Unpack

import torch
from torch import Tensor

from saccade.kernels.cpu.attention import NO_MEMORY, STORAGE, Attention, Rows, Rules, describe
from saccade.kernels.cpu.library import library

UNORDERED = 2
"""What the engine returns for a layout whose rows are out of order."""


class AttentionBackward(ctypes.Structure):
    """One problem; `problem_backward.hpp` has the comments."""

    _fields_ = (
        ("forward", Attention), ("out", Rows), ("grad_out", Rows), ("out_storage", ctypes.c_int32),
        ("grad_storage", ctypes.c_int32), ("grad_lse", ctypes.c_void_p), ("delta", ctypes.c_void_p),
        ("dq", ctypes.c_void_p), ("dk", ctypes.c_void_p), ("dv", ctypes.c_void_p),
    )  # fmt: skip


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    delta: Tensor | None = None,
    **rules: Unpack[Rules],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention`; extra memory is that of the results and a few tiles per thread.

    Args:
        grad_out: `[B, H, M, E]`, fp32 or the dtype of q, finite.
        grad_lse: fp32 `[B, H, M]`; None for zeros.
        q: `[B, H, M, D]`, any strides.
        k: `[B, G, N, D]`, finite.
        v: `[B, G, N, E]`, finite.
        out: Result of the forward, fp32 or the dtype of q; not read with `delta`.
        lse: Result of the forward; infinite where a query sees nothing, whose gradients are 0.
        delta: fp32 `[B, H, M]`, sum of out * grad_out, minus grad_lse, if that is known already.
        **rules: See `Rules`.

    Returns:
        dq, dk, dv in fp32, and delta (0 where a query sees nothing).

    Raises:
        ValueError: If the layout points outside, or its indices do not ascend within a row.
        MemoryError: If there is no memory for the threads' scratch.
    """
    problem, alive = describe(q, k, v, **rules)
    grad_out = grad_out if grad_out.stride(3) == 1 else grad_out.contiguous()
    lse = lse.contiguous()
    problem.lse = lse.data_ptr()
    dq = torch.zeros(q.shape, dtype=torch.float32)
    dk, dv = torch.empty(k.shape, dtype=torch.float32), torch.empty(v.shape, dtype=torch.float32)
    call = AttentionBackward(problem, grad_out=Rows.of(grad_out), grad_storage=STORAGE[grad_out.dtype])
    if delta is None:
        out = out if out.stride(3) == 1 else out.contiguous()
        call.out, call.out_storage = Rows.of(out), STORAGE[out.dtype]
        delta = torch.empty(lse.shape, dtype=torch.float32)
    if grad_lse is not None:
        grad_lse = grad_lse.float().contiguous()
        call.grad_lse = grad_lse.data_ptr()
    delta = delta.contiguous()
    call.delta, call.dq, call.dk, call.dv = (x.data_ptr() for x in (delta, dq, dk, dv))
    failed = library().saccade_attend_backward(ctypes.byref(call))
    if failed == UNORDERED:
        raise ValueError("layout.indices: expected to ascend within each row")
    if failed:
        raise MemoryError(NO_MEMORY)
    del alive
    return dq, dk, dv, delta
