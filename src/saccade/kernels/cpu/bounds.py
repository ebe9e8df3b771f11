"""Refusing layouts that point outside: the engine turns their numbers into addresses."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.kernels.cpu.library import library

if TYPE_CHECKING:
    from saccade.types import BlockLayout

FIELDS = {"indptr": torch.int64, "indices": torch.int32, "kinds": torch.int32, "bits": torch.uint8}


def checked(layout: BlockLayout) -> dict[str, Tensor]:
    """The layout's tensors, contiguous, after one pass over them; the work on each entry is thousands of times that.

    Args:
        layout: What the engine is about to run.

    Returns:
        `indptr`, `indices`, `kinds` and `bits` by name.

    Raises:
        ValueError: If a tensor is of the wrong dtype or shape, or a value points outside.
    """
    rows, entries = layout.batch * layout.heads * layout.query_blocks, layout.indices.shape[0]
    patterns, width = layout.bits.shape[0], -(-layout.block[0] * layout.block[1] // 8)
    shapes = {"indptr": (rows + 1,), "indices": (entries,), "kinds": (entries,), "bits": (patterns, width)}
    found = {}
    for name, dtype in FIELDS.items():
        x = getattr(layout, name)
        if x.dtype != dtype or x.shape != shapes[name] or x.device.type != "cpu":
            raise ValueError(
                f"layout.{name} of dtype {x.dtype}, shape {tuple(x.shape)} on {x.device}: "
                f"expected {dtype}, {shapes[name]} on cpu"
            )
        found[name] = x.contiguous()
    place = ctypes.c_int64()
    pointers = {name: ctypes.c_void_p(x.data_ptr()) for name, x in found.items()}
    sizes = [ctypes.c_int64(size) for size in (rows, entries, layout.key_blocks, patterns)]
    outside = library().saccade_layout_outside(
        pointers["indptr"], sizes[0], pointers["indices"], pointers["kinds"], *sizes[1:], ctypes.byref(place)
    )
    if outside:
        name = ("indptr", "indices", "kinds")[outside - 1]
        expected = {
            "indptr": f"to rise from 0 to at most {entries}",
            "indices": f"a key block in [0, {layout.key_blocks})",
            "kinds": f"-1 or a pattern in [0, {patterns})",
        }[name]
        raise ValueError(f"layout.{name}[{place.value}]={int(found[name][place.value])}: expected {expected}")
    return found
