"""Scores of few queries over a stored cache on the C++ engine."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from saccade.kernels.cpu.attention import NO_MEMORY
from saccade.kernels.cpu.decoding import Pages, _packed, over_keys
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
    alive: list[Tensor] = []
    q, k = _packed(q), _packed(k)
    out = q.new_empty(*q.shape[:3], pages.longest, dtype=torch.float32)
    problem = over_keys(q, k, pages, alive)
    problem.a.out, problem.a.scale = out.data_ptr(), scale
    if library().saccade_decode_scores(ctypes.byref(problem)):
        raise MemoryError(NO_MEMORY)
    return out
