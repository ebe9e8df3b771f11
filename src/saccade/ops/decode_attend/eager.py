"""The portable implementation: stretches of the cache made dense, as many tokens at a time as the workspace holds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.ops.checks import accumulation_dtype
from saccade.ops.merge import merge
from saccade.ops.tile import tile_forward
from saccade.types import AttentionOutput, KVPages
from saccade.types.pages import dequantise

CPU_CACHE = 32 * 2**20
"""On CPUs stretches that stay in cache are faster."""


def _stretch(cache: KVPages, token: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of tokens `[L]`, or of each head's own `[B, G, L]`: `[B, G, L, .]`; bool: which are there."""
    present = (token >= 0) & (token < cache.lengths[..., None])
    token = token.clamp(min=0).expand_as(present)
    entry = token // cache.page_size
    dense = []
    for x, scale, zero, table in cache.parts():
        page = table.gather(2, entry.clamp(max=table.shape[2] - 1)).masked_fill(~present, 0)
        at = (page, token % cache.page_size)
        rows = x[at] if scale is None else dequantise(x[at], scale[at], None if zero is None else zero[at])
        dense.append(rows.to(dtype).masked_fill(~present[..., None], 0.0))
    return dense[0], dense[1], present


def forward(
    q: Tensor, cache: KVPages, left: int, right: int, softcap: float | None, scale: float, workspace: int,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`out` `[B, H, M, E]` in q's dtype and `lse` `[B, H, M]`."""
    batch, heads, queries, dim = q.shape
    if slots is not None and slots.shape[1] != cache.table.shape[1]:  # a list per query head: each a head of its own
        share = slots.shape[1] // cache.table.shape[1]
        table, keys, lengths = (x.repeat_interleave(share, 1) for x in (cache.table, cache.key_pages, cache.lengths))
        cache = replace(cache, table=table, lengths=lengths, key_table=keys)
    kv_heads, dtype = cache.table.shape[1], accumulation_dtype(q.dtype)
    rows = heads // kv_heads * queries
    tiles = q.reshape(batch * kv_heads, rows, dim).to(dtype)
    nothing = tiles.new_zeros(*tiles.shape[:2], cache.dims[1])
    total = AttentionOutput(nothing, tiles.new_full(tiles.shape[:2], -torch.inf))
    workspace = min(workspace, CPU_CACHE) if q.device.type == "cpu" else workspace
    token_bytes = batch * kv_heads * (3 * sum(cache.dims) + 4 * rows) * dtype.itemsize
    step, longest = max(1, workspace // token_bytes), cache.longest if slots is None else slots.shape[2]
    place = torch.arange(queries, device=q.device)[:, None] + (cache.lengths - queries).reshape(-1, 1, 1)
    for start in range(0, longest, step):
        end = min(start + step, longest)
        token = torch.arange(start, end, device=q.device) if slots is None else slots[..., start:end]
        k, v, present = _stretch(cache, token, dtype)
        k, v, mask = k.flatten(0, 1), v.flatten(0, 1), present.flatten(0, 1)[:, None]
        key = token if slots is None else token.flatten(0, 1)[:, None]
        if left >= 0:
            mask = mask & (key >= place - left)
        if right >= 0:
            mask = mask & (key <= place + right)
        poison = ~v.isfinite()
        out, lse = tile_forward(tiles, k, v.masked_fill(poison, 0.0), mask, scale, softcap)
        if bool(poison.any()):
            seen = mask.expand(len(k), -1, -1).to(dtype) @ poison.to(dtype) > 0
            out = out.masked_fill(seen.repeat(1, rows // seen.shape[1], 1), torch.nan)
        total = merge([total, (out, lse)])
    lse = tiles.new_empty(0) if total.lse is None else total.lse
    return total.out.view(batch, heads, queries, -1).to(q.dtype), lse.view(batch, heads, queries)
