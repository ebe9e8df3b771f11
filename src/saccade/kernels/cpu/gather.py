"""Attention of few queries over lists of keys on the C++ engine: `problem_gather.hpp` as ctypes, and the call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from saccade.kernels.cpu.attention import NO_MEMORY, STORAGE, Rows
from saccade.kernels.cpu.decoding import Pages
from saccade.kernels.cpu.library import library

FEW_ROWS = 16
"""Queries that share a list up to which this is the kernel; for more, those of a tile of keys are worth a copy."""

VECTOR = 16
"""What D and E must be multiples of."""

_size, _int, _float, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
_Strides = _size * 3


class Gather(ctypes.Structure):
    """One problem; `problem_gather.hpp` has the comments."""

    _fields_ = (
        *((name, _size) for name in ("batch", "heads", "kv_heads", "queries", "keys", "dim", "value_dim")),
        ("storage", _int), ("threads", _int), ("q", Rows), ("k", Rows), ("v", Rows), ("out", _pointer),
        ("lse", _pointer), ("sinks", _pointer), ("scale", _float), ("softcap", _float), ("lists", _pointer),
        ("list_stride", _Strides), *((name, _size) for name in ("list_heads", "list_length", "list_group", "causal")),
        *((name, _pointer) for name in ("table", "key_table", "lengths")), ("table_stride", _size * 2),
        ("key_table_stride", _size * 2), ("page_size", _size),
    )  # fmt: skip


def gathers(q: Tensor, kv_heads: int, value_dim: int, lists: Tensor, group: int, causal: bool) -> bool:
    """Whether `gathering` serves the call; if not, `decoding` does, which is slower on lists in every dtype.

    Args:
        q: `[B, H, M, D]`.
        kv_heads: G.
        value_dim: E.
        lists: `[B or 1, 1 or G or H, ceil(M / group), K]`.
        group: Queries that share a list.
        causal: Whether keys after a query are hidden from it.

    Returns:
        Whether few rows share a list, of the same causal reach, and whole vectors cover keys and values.
    """
    share = q.shape[1] // max(lists.shape[1], kv_heads)
    fits = q.shape[3] % VECTOR == 0 and value_dim % VECTOR == 0
    return fits and share * group <= FEW_ROWS and (group == 1 or not causal)


def gathering(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    *,
    scale: float,
    group: int = 1,
    causal: bool = False,
    pages: Pages | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over lists of keys, read in place and once for all the queries that share a list.

    What the engines' callers have checked, and `gathers`, is not checked again.

    Args:
        q: `[B, H, M, D]`, any strides.
        k: `[B, G, N, D]`, or pages `[P, page_size, D]`.
        v: `[B, G, N, E]`, or pages.
        lists: int64 `[B or 1, 1 or G or H, ceil(M / group), K]`: what groups of queries attend to; -1 is an empty slot,
            with pages so is what a head has not stored.
        scale: Factor on q k^T.
        group: Queries that share a list.
        causal: Hide keys j > i + N - M from query i; with a group of one, and without pages.
        pages: What k and v are pages of, in floating point.
        softcap: Scores become softcap * tanh(score / softcap).
        sinks: `[H]`, logits that bring no value.

    Returns:
        Out `[B, H, M, E]` in q's dtype and fp32 lse `[B, H, M]`.

    Raises:
        MemoryError: If there is no memory for the threads' scratch.
        ValueError: If a list points outside the keys.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3] if pages is None else (pages.table.shape[1], pages.longest)
    value_dim = v.shape[-1]
    q, k, v, lists = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, lists))
    sinks = None if sinks is None else sinks.float().contiguous()
    out = q.new_empty(batch, heads, queries, value_dim)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    strides = lists.stride()
    places = (Rows.of(x) if pages is None else Rows(x.data_ptr(), x.stride(0), 0, x.stride(1)) for x in (k, v))
    problem = Gather(
        batch, heads, kv_heads, queries, keys, dim, value_dim, STORAGE[q.dtype], torch.get_num_threads(),
        Rows.of(q), *places, out.data_ptr(), lse.data_ptr(),
        None if sinks is None else sinks.data_ptr(), scale, softcap or 0.0, lists.data_ptr(),
        _Strides(*(0 if size == 1 else step for size, step in zip(lists.shape[:3], strides, strict=False))),
        max(lists.shape[1], kv_heads), lists.shape[3], group, causal,
    )  # fmt: skip
    if pages is not None:
        table, lengths = pages.table.contiguous(), pages.lengths.contiguous()
        key_table = table if pages.key_table is None else pages.key_table.contiguous()
        problem.table, problem.table_stride = table.data_ptr(), (_size * 2)(*table.stride()[:2])
        problem.key_table, problem.key_table_stride = key_table.data_ptr(), (_size * 2)(*key_table.stride()[:2])
        problem.page_size, problem.lengths = k.shape[1], lengths.data_ptr()
    code = library().saccade_gather(ctypes.byref(problem))
    if code == 1:
        raise MemoryError(NO_MEMORY)
    if code:
        low, high = (int(bound) for bound in torch.aminmax(lists))
        raise ValueError(f"index.indices in [{low}, {high}]: expected -1 or positions in [0, {keys})")
    return out, lse
