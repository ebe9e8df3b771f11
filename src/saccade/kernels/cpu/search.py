"""Best-first searches in graphs of stored keys on the C++ engine: `problem_search.hpp` as ctypes, and the call.

A thread's scratch is a bit for each key, and 16 bytes for each that is kept or may be new in a round.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from saccade.kernels.cpu.attention import NO_MEMORY, STORAGE, Attention, Rows
from saccade.kernels.cpu.decoding import CODES, Decode, Pages, _packed, _scales, _size
from saccade.kernels.cpu.library import library

_pointer = ctypes.c_void_p


class Graph(ctypes.Structure):
    """A graph for each key/value head."""

    _fields_ = (
        *((name, _pointer) for name in ("lists", "links", "entries")),
        *((name, _size) for name in ("queries", "degree", "keys", "each", "first")),
    )  # fmt: skip


class Search(ctypes.Structure):
    """One problem; `problem_search.hpp` has the comments."""

    _fields_ = (
        ("cache", Decode), ("graph", Graph), ("width", _size), ("expand", _size), ("found", _pointer),
        ("looked", _pointer),
    )  # fmt: skip


def search(
    q: Tensor, k: Tensor, pages: Pages, graph: tuple[Tensor, Tensor, Tensor], width: int, expand: int
) -> tuple[Tensor, Tensor]:
    """Slots that score highest as far as a search finds them; what callers have checked is not checked again.

    Args:
        q: `[B, H, 1, D]`.
        k: Pages `[P, page_size, .]`.
        pages: What k is pages of.
        graph: int32 `lists` `[B, G, S, degree]`, `links` `[B, G, n, each]` and `entries` `[B, G, first]`; -1 for none.
        width: Keys kept while searching.
        expand: Keys whose neighbours are looked at in a round.

    Returns:
        int64 `[B, H, width]`, by falling score, -1 where fewer were found; and int64 `[B, H, 2]`, keys whose score was
        taken and numbers of the graph that were read.

    Raises:
        MemoryError: If there is no memory for the threads' scratch.
    """
    batch, heads, _, dim = q.shape
    q, k = _packed(q.float()), _packed(k)
    table = (pages.table if pages.key_table is None else pages.key_table).contiguous()
    lists, links, entries = (x.contiguous() for x in graph)
    lengths = pages.lengths.contiguous()
    found = q.new_empty(batch, heads, width, dtype=torch.int64)
    looked = q.new_empty(batch, heads, 2, dtype=torch.int64)
    cache = Decode(
        Attention(
            batch, heads, table.shape[1], 1, pages.longest, dim, 0, STORAGE[q.dtype], torch.get_num_threads(),
            Rows.of(q), Rows(k.data_ptr(), k.stride(0), 0, k.stride(1)),
        ),
        STORAGE[k.dtype] if pages.bits is None else CODES[pages.bits],
        table=table.data_ptr(), table_stride=(_size * 2)(*table.stride()[:2]), page_size=k.shape[1],
        lengths=lengths.data_ptr(),
    )  # fmt: skip
    alive: list[Tensor] = []
    k_scale, _, k_zero, _ = pages.scales
    if k_scale is not None:
        cache.k_scales = _scales(k_scale, k_zero, dim, alive)
    problem = Search(
        cache,
        Graph(
            lists.data_ptr(), links.data_ptr(), entries.data_ptr(), *lists.shape[2:], *links.shape[2:],
            entries.shape[2],
        ),
        width, expand, found.data_ptr(), looked.data_ptr(),
    )  # fmt: skip
    if library().saccade_search(ctypes.byref(problem)):
        raise MemoryError(NO_MEMORY)
    return found, looked
