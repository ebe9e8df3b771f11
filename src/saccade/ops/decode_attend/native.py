"""`decode_attend` on the C++ engine, which reads pages in place and takes codes apart in its tiles.

With AVX-512 VNNI, up to 8 queries that share codes, in groups of 64 channels or multiples, meet them as products of
bytes: queries are rounded to 15 bits of the greatest of 64 channels, weights to 16 bits of the greatest of 128 tokens.
"""

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
    listed = () if call["slots"] is None else call["slots"].shape
    if 0 in (*q.shape, *cache.k.shape, *cache.v.shape, *listed):
        return "the problem is empty"
    return unusable(q)


def engine_pages(cache: KVPages) -> cpu.Pages:
    """The cache as the engine takes it; nothing is copied."""
    return cpu.Pages(
        cache.table, cache.lengths, cache.longest, cache.dims, cache.bits,
        (cache.k_scale, cache.v_scale, cache.k_zero, cache.v_zero), cache.key_table,
    )  # fmt: skip


def _gathers(q: Tensor, cache: KVPages, left: int, slots: Tensor) -> bool:
    """Whether the kernel for lists serves the call: one query, which no rule keeps from a listed key, and no codes."""
    return (
        cache.bits is None and q.shape[2] == 1 and left < 0
        and cpu.gathers(q, cache.table.shape[1], cache.dims[1], slots[:, :, None], 1, causal=False)
    )  # fmt: skip


def forward(
    q: Tensor, cache: KVPages, left: int, right: int, softcap: float | None, scale: float,
    workspace: int,  # noqa: ARG001
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `eager.forward`; its temporaries are a tile per thread and one result per 512 tokens or more."""
    lists = None
    if slots is not None and _gathers(q, cache, left, slots):
        return cpu.gathering(
            q, cache.k, cache.v, slots[:, :, None], scale=scale, softcap=softcap, pages=engine_pages(cache)
        )
    if slots is not None:
        lengths = cache.lengths.repeat_interleave(slots.shape[1] // cache.lengths.shape[1], 1)
        lists = slots.masked_fill(slots >= lengths[..., None], -1)[:, :, None]
    out, lse = cpu.decoding(
        q, cache.k, cache.v, scale=scale, left=left, right=right, softcap=softcap, pages=engine_pages(cache),
        lists=lists, group=q.shape[2],
    )  # fmt: skip
    return out.to(q.dtype), lse


__all__ = ["engine_pages", "forward", "refuses"]
