"""Scores of few queries over a stored cache on the C++ engine."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from saccade.kernels.cpu.attention import NO_MEMORY, STORAGE, Attention, Rows
from saccade.kernels.cpu.decoding import CODES, Decode, Pages, _packed, _scales, _size
from saccade.kernels.cpu.library import library


def decode_scores(q: Tensor, k: Tensor, pages: Pages, scale: float) -> Tensor:
    """`scale` q k^T over pages, read in place; what the engines' callers have checked is not checked again.

    Args:
        q: `[B, H, M, D]`, any strides, those of the last M places of each head.
        k: Pages `[P, page_size, .]`.
        pages: What k is pages of.
        scale: Factor on q k^T.

    Returns:
        fp32 `[B, H, M, longest]`; -inf past a head's length and for places after the query's own.

    Raises:
        MemoryError: If there is no memory for the threads' scratch.
    """
    batch, heads, queries, dim = q.shape
    q, k = _packed(q), _packed(k)
    table = (pages.table if pages.key_table is None else pages.key_table).contiguous()
    lengths = pages.lengths.contiguous()
    out = q.new_empty(batch, heads, queries, pages.longest, dtype=torch.float32)
    problem = Decode(
        Attention(
            batch, heads, table.shape[1], queries, pages.longest, dim, 0, STORAGE[q.dtype], torch.get_num_threads(),
            Rows.of(q), Rows(k.data_ptr(), k.stride(0), 0, k.stride(1)), out=out.data_ptr(), scale=scale,
        ),
        STORAGE[k.dtype] if pages.bits is None else CODES[pages.bits],
        table=table.data_ptr(), table_stride=(_size * 2)(*table.stride()[:2]), page_size=k.shape[1],
        lengths=lengths.data_ptr(),
    )  # fmt: skip
    alive: list[Tensor] = []
    k_scale, _, k_zero, _ = pages.scales
    if k_scale is not None:
        problem.k_scales = _scales(k_scale, k_zero, dim, alive)
    if library().saccade_decode_scores(ctypes.byref(problem)):
        raise MemoryError(NO_MEMORY)
    return out
