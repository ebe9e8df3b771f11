"""Attention within boxes of a grid on the C++ engine: `problem_boxes.hpp` as ctypes, and the calls."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from saccade.kernels.cpu.attention import STORAGE, Rows
from saccade.kernels.cpu.library import library

_size, _int, _float, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p

AXES = 3
"""Axes that the engine knows; fewer are filled up with axes of one token in front."""

_Axes = _size * AXES

ACROSS = ("cheaper", "tiles", "rows")
"""What may lie across the lanes: compact tiles of tokens, which share the keys that any of them sees, or rows, which
work on no other pairs than those kept but read more; tests choose, everybody else takes what the engine estimates."""


class Boxes(ctypes.Structure):
    """One problem; `problem_boxes.hpp` has the comments."""

    _fields_ = (
        *((name, _size) for name in ("batch", "heads", "kv_heads", "dim", "value_dim")),
        ("size", _Axes), ("dilation", _Axes), ("first", _pointer), ("last", _pointer),
        ("storage", _int), ("threads", _int), ("q", Rows), ("k", Rows), ("v", Rows), ("out", _pointer),
        ("lse", _pointer), ("scale", _float), ("grad_out", _pointer), ("grad_lse", _pointer), ("delta", _pointer),
        ("dq", _pointer), ("dk", _pointer), ("dv", _pointer), ("across", _int),
        ("missing", _int),
    )  # fmt: skip


def _problem(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, sizes: list[int], dilation: list[int], scale: float,
    across: str,
) -> tuple[Boxes, list[Tensor]]:  # fmt: skip
    """The problem, and the tensors that must outlive it."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    first, last = (x if x.dtype == torch.int32 and x.is_contiguous() else x.int().contiguous() for x in (first, last))
    ones = (1,) * (AXES - len(sizes))
    problem = Boxes(
        q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3],
        _Axes(*ones, *sizes), _Axes(*ones, *map(min, dilation, sizes)), first.data_ptr(), last.data_ptr(),
        STORAGE[q.dtype], torch.get_num_threads(), Rows.of(q), Rows.of(k), Rows.of(v), scale=scale,
        across=ACROSS.index(across), missing=len(ones),
    )  # fmt: skip
    return problem, [q, k, v, first, last]


def _check(code: int) -> None:
    if code == 1:
        raise MemoryError("impl='cpu': no memory for the threads' scratch")
    if code:
        raise ValueError("index: expected windows on the grid, within their dilation's class, whose ends rise")


def boxes_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, sizes: list[int], dilation: list[int], scale: float,
    across: str = "cheaper",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention within boxes of a grid.

    Args:
        q: `[B, H, N, D]`, any strides.
        k: `[B, G, N, D]`.
        v: `[B, G, N, E]`.
        first: int32 `[sum of sizes]`, first key of each coordinate's window, one axis after another.
        last: int32 `[sum of sizes]`, last key.
        sizes: Of one to three axes, row-major; their product is N.
        dilation: Gap between neighbours along each axis.
        scale: Factor on q k^T.
        across: One of `ACROSS`.

    Returns:
        Out `[B, H, N, E]` and lse `[B, H, N]`, fp32.

    Raises:
        MemoryError: If there is no memory for the threads' scratch.
        ValueError: If the windows leave the grid.
    """
    problem, alive = _problem(q, k, v, first, last, sizes, dilation, scale, across)
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    problem.out, problem.lse = out.data_ptr(), lse.data_ptr()
    _check(library().saccade_boxes(ctypes.byref(problem)))
    del alive
    return out, lse


def boxes_gradients(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    first: Tensor, last: Tensor, sizes: list[int], dilation: list[int], scale: float, across: str = "cheaper",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `boxes_attention`.

    Args:
        grad_out: `[B, H, N, E]`.
        grad_lse: `[B, H, N]`.
        q: As given to it; so k, v and the windows.
        k: See q.
        v: See q.
        out: What it returned.
        lse: What it returned.
        first: See q.
        last: See q.
        sizes: See q.
        dilation: See q.
        scale: See q.
        across: See q.

    Returns:
        Of q, k and v, fp32.

    Raises:
        MemoryError: If there is no memory for the threads' scratch.
        ValueError: If the windows leave the grid.
    """
    problem, alive = _problem(q, k, v, first, last, sizes, dilation, scale, across)
    given = [x.float().contiguous() for x in (grad_out, grad_lse, out, lse)]
    delta = torch.empty_like(given[3])
    problem.grad_out, problem.grad_lse, problem.out, problem.lse = (x.data_ptr() for x in given)
    grads = [x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v)]
    problem.delta = delta.data_ptr()
    problem.dq, problem.dk, problem.dv = (x.data_ptr() for x in grads)
    _check(library().saccade_boxes_backward(ctypes.byref(problem)))
    del alive
    return grads[0], grads[1], grads[2]
