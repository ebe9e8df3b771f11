"""Attention over tokens packed in groups on the C++ engine: `problem_groups.hpp` as ctypes, and the call."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.kernels.cpu.attention import NO_MEMORY, STORAGE, Rows
from saccade.kernels.cpu.library import library

if TYPE_CHECKING:
    from saccade.types.groups import KVGroups

GROUP_CHANNELS = 16
"""Multiples of so many channels fill the vectors of every instruction set."""

SHORTEST = 512
"""Tokens of a cut, at least."""

UNITS = 64
"""Heads times cuts, where there are tokens enough: for any number of cores."""

_size, _int, _float, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class Part(ctypes.Structure):
    """What each group has of one kind."""

    _fields_ = (("data", _pointer), ("stride", _size))

    @classmethod
    def of(cls, x: Tensor | None) -> Part:
        """Where `x` `[P, width]` lies; it must outlive the call."""
        return cls() if x is None else cls(x.data_ptr(), x.stride(0) * x.element_size())


class Groups(ctypes.Structure):
    """One problem; `problem_groups.hpp` has the comments."""

    _fields_ = (
        *((name, _size) for name in ("batch", "heads", "kv_heads", "queries", "dim", "value_dim")),
        ("storage", _int), ("scale_storage", _int), ("bits", _int), ("threads", _int), ("q", Rows), ("out", _pointer),
        ("lse", _pointer), ("scale", _float), ("softcap", _float),
        *((name, _size) for name in ("size", "channels", "cuts", "stretch")),
        *((name, Part) for name in ("key", "key_scale", "key_low", "value", "value_scale", "value_low", "value_norm")),
        ("table", _pointer), ("table_stride", _size * 2), ("lengths", _pointer),
    )  # fmt: skip


def attend_groups(q: Tensor, groups: KVGroups, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Softmax attention of each cut of the groups, which are read in place; where cuts are depends on sizes alone.

    What the engines' callers have checked is not checked again.

    Args:
        q: `[B, H, M, D]`, any strides, D, E and the value channels that share a scale multiples of `GROUP_CHANNELS`.
        groups: At least one.
        scale: Factor on q k^T.
        softcap: As in `decode_attend`.

    Returns:
        Out `[cuts, B, H, M, E]` and lse `[cuts, B, H, M]`, fp32; 0 and -inf where a cut has nothing of a head.

    Raises:
        MemoryError: If there is no memory for the threads' scratch.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, value_dim = groups.table.shape[1], groups.dims[1]
    q = q if q.stride(3) == 1 else q.contiguous()
    table, lengths = groups.table.contiguous(), groups.lengths.contiguous()
    parts = [x if x is None or x.stride(1) == 1 else x.contiguous() for x in groups.parts]
    stretch = max(-(-SHORTEST // groups.size), -(-groups.longest * batch * kv_heads // UNITS))
    cuts = -(-groups.longest // stretch)
    out = q.new_empty(cuts, batch, heads, queries, value_dim, dtype=torch.float32)
    lse = q.new_empty(cuts, batch, heads, queries, dtype=torch.float32)
    problem = Groups(
        batch, heads, kv_heads, queries, dim, value_dim, STORAGE[q.dtype], STORAGE[groups.key_scale.dtype], groups.bits,
        torch.get_num_threads(), Rows.of(q), out.data_ptr(), lse.data_ptr(), scale, softcap or 0.0, groups.size,
        groups.channels, cuts, stretch, *map(Part.of, parts), table.data_ptr(), (_size * 2)(*table.stride()[:2]),
        lengths.data_ptr(),
    )  # fmt: skip
    if library().saccade_attend_groups(ctypes.byref(problem)):
        raise MemoryError(NO_MEMORY)
    return out, lse
