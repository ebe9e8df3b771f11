"""Softmax attention on the C++ engine: `problem.hpp` as ctypes, and the call."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Required, TypedDict, Unpack

import torch
from torch import Tensor

from saccade.kernels.cpu.bounds import checked
from saccade.kernels.cpu.library import library

if TYPE_CHECKING:
    from saccade.types import BlockLayout

STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of q, k and v; everything is computed in fp32."""

NO_MEMORY = "impl='cpu': no memory for the threads' scratch"

_size, _int, _float, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class Rows(ctypes.Structure):
    """A tensor `[B, heads, rows, dim]`, last axis contiguous."""

    _fields_ = (("data", _pointer), ("batch_stride", _size), ("head_stride", _size), ("row_stride", _size))

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """Where `x` lies; it must outlive the call."""
        return cls(x.data_ptr(), *x.stride()[:3])


class Attention(ctypes.Structure):
    """One problem; `problem.hpp` has the comments."""

    _fields_ = (
        *((name, _size) for name in ("batch", "heads", "kv_heads", "queries", "keys", "dim", "value_dim")),
        ("storage", _int), ("threads", _int), ("q", Rows), ("k", Rows), ("v", Rows), ("out", _pointer),
        ("lse", _pointer), ("scale", _float), ("softcap", _float), ("left", _size), ("right", _size),
        ("bias", _pointer), ("bias_stride", _size * 4), ("q_segments", _pointer), ("kv_segments", _pointer),
        ("q_segment_stride", _size), ("kv_segment_stride", _size), ("indptr", _pointer), ("indices", _pointer),
        ("kinds", _pointer), ("bits", _pointer), ("layout_batch", _size), ("layout_heads", _size),
        ("block_q", _size), ("block_k", _size), ("alibi", _pointer),
    )  # fmt: skip

    def point(self, bias: Tensor | None, segments: tuple[Tensor, Tensor] | None, alibi: Tensor | None) -> list[Tensor]:
        """Take up a bias, segment ids and slopes; returns what must outlive the call."""
        alive: list[Tensor] = []
        if bias is not None:
            alive.append(bias.float().expand(self.batch, self.heads, self.queries, self.keys))
            self.bias = alive[-1].data_ptr()
            self.bias_stride = (_size * 4)(*alive[-1].stride())
        if segments is not None:
            q_ids, kv_ids = (ids.int().expand(self.batch, -1) for ids in segments)
            q_ids, kv_ids = (ids if ids.stride(1) == 1 else ids.contiguous() for ids in (q_ids, kv_ids))
            alive += [q_ids, kv_ids]
            self.q_segments, self.q_segment_stride = q_ids.data_ptr(), q_ids.stride(0)
            self.kv_segments, self.kv_segment_stride = kv_ids.data_ptr(), kv_ids.stride(0)
        if alibi is not None:
            alive.append(alibi.float().contiguous())
            self.alibi = alive[-1].data_ptr()
        return alive


class Rules(TypedDict, total=False):
    """What fixes the scores beside q and k."""

    scale: Required[float]
    """Factor on q k^T."""
    left: int
    """Keys that a query sees before its own place; -1, as without it, for all."""
    right: int
    """Keys that it sees after."""
    softcap: float | None
    """Scores become softcap * tanh(score / softcap)."""
    bias: Tensor | None
    """Added to the scores; broadcasts to `[B, H, M, N]`."""
    segments: tuple[Tensor, Tensor] | None
    """int `[B or 1, M]` and `[B or 1, N]`; negative sees nothing."""
    alibi: Tensor | None
    """`[H]`: the score of query i and key j loses alibi[h] * |i + N - M - j|."""
    layout: BlockLayout | None
    """Which blocks are computed."""


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    left: int = -1,
    right: int = -1,
    softcap: float | None = None,
    bias: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    alibi: Tensor | None = None,
    layout: BlockLayout | None = None,
) -> tuple[Attention, list[Tensor]]:
    """The problem of `attention`, without its results; the tensors returned must outlive its use."""
    batch, heads, queries, dim = q.shape
    keys, value_dim = v.shape[2:]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    problem = Attention(
        batch, heads, k.shape[1], queries, keys, dim, value_dim, STORAGE[q.dtype], torch.get_num_threads(),
        Rows.of(q), Rows.of(k), Rows.of(v), None, None, scale, 0.0 if softcap is None else softcap, left, right,
    )  # fmt: skip
    alive = [q, k, v, *problem.point(bias, segments, alibi)]
    if layout is not None:
        for name, x in checked(layout).items():
            alive.append(x)
            setattr(problem, name, x.data_ptr())
        problem.layout_batch, problem.layout_heads = layout.batch, layout.heads
        problem.block_q, problem.block_k = layout.block
    return problem, alive


def attention(q: Tensor, k: Tensor, v: Tensor, **rules: Unpack[Rules]) -> tuple[Tensor, Tensor]:
    """Softmax attention; what the engines' callers have checked is not checked again.

    Args:
        q: `[B, H, M, D]`, any strides.
        k: `[B, G, N, D]`.
        v: `[B, G, N, E]`.
        **rules: See `Rules`.

    Returns:
        Out `[B, H, M, E]` and lse `[B, H, M]`, fp32.

    Raises:
        ValueError: If the layout points outside.
        MemoryError: If there is no memory for the threads' scratch.
    """
    problem, alive = describe(q, k, v, **rules)
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    problem.out, problem.lse = out.data_ptr(), lse.data_ptr()
    if library().saccade_attend(ctypes.byref(problem)):
        raise MemoryError(NO_MEMORY)
    del alive
    return out, lse
