"""Linear attention on the C++ engine: `problem_scan.hpp` as ctypes, and the calls."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from saccade.kernels.cpu.attention import STORAGE, Rows
from saccade.kernels.cpu.library import library

_size, _int, _float, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class Scan(ctypes.Structure):
    """One problem; `problem_scan.hpp` has the comments."""

    _fields_ = (
        *((name, _size) for name in ("batch", "states", "sets", "tokens", "dim", "value_dim")),
        ("storage", _int), ("threads", _int), ("q", _pointer), ("q_stride", _size * 4), ("k", Rows), ("v", Rows),
        ("log_decay", _pointer), ("decay_stride", _size * 3), ("decay_dim", _size), ("scale", _float),
        ("start", _pointer), ("out", _pointer), ("last", _pointer),
    )  # fmt: skip


class ScanGradient(ctypes.Structure):
    """One problem of the backward pass."""

    _fields_ = (
        ("scan", Scan), ("dout", _pointer), ("dout_stride", _size * 4), ("dlast", _pointer), ("dq", _pointer),
        ("dk", _pointer), ("dv", _pointer), ("dlog_decay", _pointer), ("dstart", _pointer),
    )  # fmt: skip


def _problem(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Scan, tuple[Tensor, ...]]:
    """The problem without its results, and what it points to."""
    batch, states, sets, tokens, dim = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    state = state.contiguous()
    problem = Scan(
        batch, states, sets, tokens, dim, v.shape[3], STORAGE[q.dtype], torch.get_num_threads(), q.data_ptr(),
        (_size * 4)(*q.stride()[:4]), Rows.of(k), Rows.of(v), scale=scale, start=state.data_ptr(),
    )  # fmt: skip
    if log_decay is None:
        return problem, (q, k, v, state)
    decay = log_decay.float()
    decay = decay if decay.stride(3) == 1 or decay.shape[3] == 1 else decay.contiguous()
    problem.log_decay, problem.decay_dim = decay.data_ptr(), decay.shape[3]
    problem.decay_stride = (_size * 3)(*decay.expand(batch, states, tokens, -1).stride()[:3])
    return problem, (q, k, v, state, decay)


def scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The recurrence S_t = a_t S_{t-1} + k_t v_t^T, out_t = scale S_t^T q_t; what callers have checked is not again.

    Args:
        q: `[B, S, R, N, D]`, any strides: R sets of queries read each of S states.
        k: `[B, S, N, D]`.
        v: `[B, S, N, E]`.
        log_decay: Natural log of a, `[B or 1, S, N or 1, D or 1]`; None means 0.
        state: fp32 `[B, S, D, E]`, before the first token.
        scale: Factor on the outputs.

    Returns:
        Out `[B, S, R, N, E]` in q's dtype and the fp32 state after the last token.

    Raises:
        MemoryError: If there is no memory for the threads' scratch.
    """
    problem, alive = _problem(q, k, v, log_decay, state, scale)
    out, last = q.new_empty(*q.shape[:4], v.shape[3]), torch.empty_like(state, memory_format=torch.contiguous_format)
    problem.out, problem.last = out.data_ptr(), last.data_ptr()
    if library().saccade_scan(ctypes.byref(problem)):
        raise MemoryError("impl='cpu': no memory for the threads' scratch")
    del alive
    return out, last


def scan_gradient(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, dout: Tensor,
    dlast: Tensor, decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay and state, from those of the results of `scan`.

    Args:
        q: As in `scan`, like all that follow.
        k: ...
        v: ...
        log_decay: ...
        state: ...
        scale: ...
        dout: `[B, S, R, N, E]`, dtype of q.
        dlast: fp32 `[B, S, D, E]`.
        decay_gradient: Whether that of log_decay is wanted.

    Returns:
        Contiguous gradients in their tensors' dtypes; that of log_decay fp32 per token, `[B, S, N, 1 or D]`, or None.

    Raises:
        MemoryError: If there is no memory for the threads' scratch.
    """
    problem, alive = _problem(q, k, v, log_decay, state, scale)
    dout = dout if dout.stride(4) == 1 else dout.contiguous()
    dlast = dlast.contiguous()
    dq, dk, dv, dstart = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, state))
    ddecay = None
    if decay_gradient and log_decay is not None:
        ddecay = state.new_empty(*k.shape[:3], log_decay.shape[3])
    gradient = ScanGradient(
        problem, dout.data_ptr(), (_size * 4)(*dout.stride()[:4]), dlast.data_ptr(), dq.data_ptr(), dk.data_ptr(),
        dv.data_ptr(), None if ddecay is None else ddecay.data_ptr(), dstart.data_ptr(),
    )  # fmt: skip
    if library().saccade_scan_gradient(ctypes.byref(gradient)):
        raise MemoryError("impl='cpu': no memory for the threads' scratch")
    del alive
    return dq, dk, dv, ddecay, dstart
