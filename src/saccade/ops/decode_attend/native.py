"""`decode_attend` on the C++ engine, which reads pages in place and takes codes apart in its tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.attend.native import unusable
from saccade.types import KVPages


def refuses(call: Mapping[str, Any]) -> str | None:
    """Why the engine cannot serve the call, or None."""
    q, cache = call["q"], call["cache"]
    if 0 in q.shape or 0 in cache.k.shape or 0 in cache.v.shape:
        return "the problem is empty"
    return unusable(q)


def forward(
    q: Tensor, cache: KVPages, left: int, right: int, softcap: float | None, scale: float,
    workspace: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `eager.forward`; its temporaries are a tile per thread and one result per 512 tokens."""
    pages = cpu.Pages(
        cache.table, cache.lengths, cache.longest, cache.dims, cache.bits,
        (cache.k_scale, cache.v_scale, cache.k_zero, cache.v_zero),
    )  # fmt: skip
    out, lse = cpu.decoding(
        q, cache.k, cache.v, scale=scale, left=left, right=right, softcap=softcap, pages=pages
    )  # fmt: skip
    return out.to(q.dtype), lse


__all__ = ["forward", "refuses"]
