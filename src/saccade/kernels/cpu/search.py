"""Best-first searches in graphs of stored keys on the C++ engine: `problem_search.hpp` as ctypes, and the call.

A thread's scratch is a bit for each key, and 16 bytes for each that is kept or may be new in a round.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from saccade.kernels.cpu.attention import NO_MEMORY
from saccade.kernels.cpu.decoding import Decode, Pages, _packed, _size, over_keys
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
    alive: list[Tensor] = []
    q, k = _packed(q.float()), _packed(k)
    lists, links, entries = (x.contiguous() for x in graph)
    found = q.new_empty(*q.shape[:2], width, dtype=torch.int64)
    looked = q.new_empty(*q.shape[:2], 2, dtype=torch.int64)
    problem = Search(
        over_keys(q, k, pages, alive),
        Graph(
            lists.data_ptr(), links.data_ptr(), entries.data_ptr(), *lists.shape[2:], *links.shape[2:],
            entries.shape[2],
        ),
        width, expand, found.data_ptr(), looked.data_ptr(),
    )  # fmt: skip
    if library().saccade_search(ctypes.byref(problem)):
        raise MemoryError(NO_MEMORY)
    return found, looked
