"""Attention of few queries on the C++ engine: `problem_decode.hpp` as ctypes, and the call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from saccade.kernels.cpu.attention import NO_MEMORY, STORAGE, Attention, Rows, Rules
from saccade.kernels.cpu.library import library

CODES = {8: 3, 4: 4}
"""How the library calls codes of 8 and 4 bits."""

_size, _int, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


class Scales(ctypes.Structure):
    """Scales and zero points of codes."""

    _fields_ = (
        ("scale", _pointer), ("zero", _pointer), ("page_stride", _size), ("row_stride", _size), ("group", _size),
    )  # fmt: skip


class Decode(ctypes.Structure):
    """One problem; `problem_decode.hpp` has the comments."""

    _fields_ = (
        ("a", Attention), ("kv_storage", _int), ("reserved", _int), ("k_scales", Scales), ("v_scales", Scales),
        ("table", _pointer), ("table_stride", _size * 2), ("page_size", _size), ("lengths", _pointer),
        ("lists", _pointer), ("list_stride", _size * 3), ("list_heads", _size), ("list_length", _size),
        ("list_group", _size), ("key_table", _pointer), ("key_table_stride", _size * 2),
    )  # fmt: skip


@dataclass(frozen=True)
class Pages:
    """A cache in pages, as `saccade.types.KVPages` has it.

    Args:
        table: int64 `[B, G, T]`.
        lengths: int64 `[B, G]`.
        longest: The greatest length.
        dims: D and E.
        bits: Of a code: 8 or 4; None where k and v are floating point.
        scales: fp32 `[P, page_size, groups]`: of k, then of v; then their zero points or None.
        key_table: int64 `[B, G, T]`, the pages of k; None for those of `table`.
    """

    table: Tensor
    lengths: Tensor
    longest: int
    dims: tuple[int, int]
    bits: int | None = None
    scales: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None, None, None, None)
    key_table: Tensor | None = None


def _packed(x: Tensor) -> Tensor:
    """`x` with its last axis contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _scales(scale: Tensor, zero: Tensor | None, dim: int, alive: list[Tensor]) -> Scales:
    scale = _packed(scale)  # pages of a store lie apart: a copy would be one of all that was ever reserved
    if zero is not None:
        zero = _packed(zero)
        if zero.stride() != scale.stride():
            scale, zero = scale.contiguous(), zero.contiguous()
        alive.append(zero)
    alive.append(scale)
    return Scales(
        scale.data_ptr(), None if zero is None else zero.data_ptr(), *scale.stride()[:2], dim // scale.shape[2]
    )


def over_keys(q: Tensor, k: Tensor, pages: Pages, alive: list[Tensor]) -> Decode:
    """A problem that reads the keys of pages and no values; `alive` gets what it points to, beside q and k.

    Args:
        q: `[B, H, M, D]`, packed.
        k: Pages `[P, page_size, .]`, packed.
        pages: What k is pages of.
        alive: To be kept as long as the problem.

    Returns:
        The problem; it has no results yet.
    """
    batch, heads, queries, dim = q.shape
    table = (pages.table if pages.key_table is None else pages.key_table).contiguous()
    lengths = pages.lengths.contiguous()
    alive += [table, lengths]
    problem = Decode(
        Attention(
            batch, heads, table.shape[1], queries, pages.longest, dim, 0, STORAGE[q.dtype], torch.get_num_threads(),
            Rows.of(q), Rows(k.data_ptr(), k.stride(0), 0, k.stride(1)),
        ),
        STORAGE[k.dtype] if pages.bits is None else CODES[pages.bits],
        table=table.data_ptr(), table_stride=(_size * 2)(*table.stride()[:2]), page_size=k.shape[1],
        lengths=lengths.data_ptr(),
    )  # fmt: skip
    k_scale, _, k_zero, _ = pages.scales
    if k_scale is not None:
        problem.k_scales = _scales(k_scale, k_zero, dim, alive)
    return problem


def decoding(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pages: Pages | None = None,
    lists: Tensor | None = None,
    group: int = 0,
    **rules: Unpack[Rules],
) -> tuple[Tensor, Tensor]:
    """Softmax attention that reads each key and value once for all the queries that share it.

    What the engines' callers have checked is not checked again.

    Args:
        q: `[B, H, M, D]`, any strides.
        k: `[B, G, N, D]`, or pages `[P, page_size, .]`.
        v: `[B, G, N, E]`, or pages.
        pages: What k and v are pages of.
        lists: int64 `[B or 1, 1, G or H, ceil(M / group), K]`: what groups of queries attend to; -1 is an empty slot.
        group: Queries that share a list.
        **rules: See `Rules`; no layout, and neither bias nor segments with pages.

    Returns:
        Out `[B, H, M, E]` and lse `[B, H, M]`, fp32.

    Raises:
        MemoryError: If there is no memory for the threads' scratch.
    """
    batch, heads, queries, dim = q.shape
    q, k, v = _packed(q), _packed(k), _packed(v)
    kv_heads = k.shape[1] if pages is None else pages.table.shape[1]
    keys = k.shape[2] if pages is None else pages.longest
    value_dim = v.shape[3] if pages is None else pages.dims[1]
    out = q.new_empty(batch, heads, queries, value_dim, dtype=torch.float32)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    problem = Decode(
        Attention(
            batch, heads, kv_heads, queries, keys, dim, value_dim, STORAGE[q.dtype], torch.get_num_threads(),
            Rows.of(q), Rows.of(k), Rows.of(v), out.data_ptr(), lse.data_ptr(), rules["scale"],
            rules.get("softcap") or 0.0, rules.get("left", -1), rules.get("right", -1),
        ),
        STORAGE[k.dtype] if pages is None or pages.bits is None else CODES[pages.bits],
        list_heads=kv_heads, list_group=queries,
    )  # fmt: skip
    alive = problem.a.point(rules.get("bias"), rules.get("segments"), rules.get("alibi"))  # what the problem points to
    if pages is not None:
        table, lengths = pages.table.contiguous(), pages.lengths.contiguous()
        alive += [table, lengths]
        problem.a.k, problem.a.v = (Rows(x.data_ptr(), x.stride(0), 0, x.stride(1)) for x in (k, v))
        problem.table, problem.table_stride = table.data_ptr(), (_size * 2)(*table.stride()[:2])
        problem.page_size, problem.lengths = k.shape[1], lengths.data_ptr()
        if pages.key_table is not None:
            key_table = pages.key_table.contiguous()
            alive.append(key_table)
            problem.key_table, problem.key_table_stride = key_table.data_ptr(), (_size * 2)(*key_table.stride()[:2])
        k_scale, v_scale, k_zero, v_zero = pages.scales
        if k_scale is not None and v_scale is not None:
            problem.k_scales = _scales(k_scale, k_zero, dim, alive)
            problem.v_scales = _scales(v_scale, v_zero, value_dim, alive)
    if lists is not None:
        lists = _packed(lists)
        alive.append(lists)
        strides = (0 if lists.shape[axis] == 1 else lists.stride(axis) for axis in range(3))
        problem.lists, problem.list_stride = lists.data_ptr(), (_size * 3)(*strides)
        problem.list_heads = max(lists.shape[1], kv_heads)
        problem.list_length, problem.list_group = lists.shape[3], group
    if library().saccade_decode(ctypes.byref(problem)):
        raise MemoryError(NO_MEMORY)
    return out, lse
