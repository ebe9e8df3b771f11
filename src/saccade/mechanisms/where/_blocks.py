"""What the block selectors share: pooled blocks, scores between them, and which blocks lie in the past."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.checks import accumulation_dtype
from saccade.types import BlockLayout
from saccade.types.bits import pack_bits, spread_rows, unique_rows
from saccade.types.layout import FULL

NO_LENGTH = 1e-12
"""Vectors shorter than this count as so long, in a division by their length."""


def mean_pool(x: Tensor, size: int) -> Tensor:
    """Mean of every block of `size` tokens of `[B, H, N, D]`: `[B, H, ceil(N / size), D]`, at least fp32."""
    x = x.to(accumulation_dtype(x.dtype))
    tokens = x.shape[2]
    if size == 1 or tokens == 0:
        return x
    padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % size)) if tokens % size else x
    means = padded.unflatten(2, (padded.shape[2] // size, size)).mean(3)
    if tokens % size:
        means[:, :, -1] = x[:, :, tokens - tokens % size :].mean(2)
    return means


def mean_direction(x: Tensor, size: int) -> Tensor:
    """Mean of the unit vectors of every block of `size` tokens; as `mean_pool`, without a copy of `x`."""
    x = x.to(accumulation_dtype(x.dtype))
    tokens, dim = x.shape[2:]
    shares = torch.linalg.vector_norm(x, dim=-1).clamp_min_(NO_LENGTH).reciprocal_()
    whole = tokens // size
    blocks, weights = x[:, :, : whole * size].unflatten(2, (whole, size)), shares[:, :, : whole * size]
    means = torch.matmul(weights.reshape(*x.shape[:2], whole, 1, size), blocks)[..., 0, :] / size
    if tokens % size == 0:
        return means
    rest = shares[:, :, None, whole * size :] @ x[:, :, whole * size :]
    return torch.cat([means, rest / (tokens % size)], 2).view(*x.shape[:2], -1, dim)


def head_scores(q: Tensor, k: Tensor) -> Tensor:
    """Scores q k^T per query head: `[B, H, Q, K]` from `[B, H, Q, D]` and `[B, G, K, D]`."""
    batch, heads, rows, dim = q.shape
    groups = k.shape[1]
    together = q.reshape(batch, groups, heads // groups * rows, dim)  # heads that share keys go in one product
    return (together @ k.transpose(-1, -2)).view(batch, heads, rows, k.shape[2])


def block_visibility(
    queries: int, keys: int, block: tuple[int, int], causal: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which blocks may be scored, and which are kept without being scored.

    Args:
        queries: M.
        keys: N.
        block: `(block_q, block_k)` in tokens.
        causal: Bottom-right aligned causality.
        device: Of the result.

    Returns:
        Bool `(past, edge)`, `[query_blocks, key_blocks]` each. A block is `past` if it ends before the first query of
        its row (all are when not causal), and `edge` if it does not but some query of the row sees some of it.
    """
    first = torch.arange(0, queries, block[0], device=device)[:, None]
    last = (first + block[0]).clamp(max=queries) - 1
    start = torch.arange(0, keys, block[1], device=device)
    if not causal:
        past = torch.ones(len(first), len(start), dtype=torch.bool, device=device)
        return past, ~past
    stop = (start + block[1]).clamp(max=keys) - 1
    past = stop < first + keys - queries
    return past, (start <= last + keys - queries) & ~past


def key_lists(kept: Tensor) -> Tensor:
    """The kept keys of each row of bool `[B, H, R, N]`, ascending: int64 `[B, H, R, K]`, -1 behind shorter lists."""
    counts = kept.sum(-1).flatten()
    row, key = kept.flatten(0, 2).nonzero().unbind(1)
    place = torch.arange(len(row), device=kept.device) - (counts.cumsum(0) - counts)[row]
    lists = torch.full((len(counts), int(counts.max()) if len(counts) else 0), -1, device=kept.device)
    lists[row, place] = key
    return lists.view(*kept.shape[:3], lists.shape[1])


def largest(x: Tensor, count: int) -> Tensor:
    """The `count` largest entries of each row, the first ones of those that tie: bool like `x`."""
    if count >= x.shape[-1]:
        return torch.ones_like(x, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    least = x.topk(count, -1).values[..., -1:]
    above, tied = x > least, x == least
    return above | (tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def key_columns(keys: int, chunk: int, device: torch.device) -> tuple[Tensor, int]:
    """Key blocks an engine likes, for a choice of chunks of keys.

    Args:
        keys: N.
        chunk: Keys per chunk.
        device: Of the result.

    Returns:
        The chunk of each key block, int64 `[key_blocks]`, and the width of a block: a divisor of the chunk from 16 to
        64 tokens if there is one, else all of it.
    """
    width = next((w for w in range(min(64, chunk), 15, -1) if chunk % w == 0), chunk)
    return torch.arange(0, keys, width, device=device) // chunk, width


def tiled_layout(chosen: Tensor, tile: int, chunk: int, keys: int) -> BlockLayout:
    """The layout in which each query has its own choice: in a tile of queries, whole rows are masked.

    Args:
        chosen: Bool `[B, H, M, chunks]`, which chunks of keys each query reads.
        tile: Queries per block of the layout.
        chunk: Keys per chunk.
        keys: N.

    Returns:
        The layout, not cut to causality.
    """
    batch, heads, queries, chunks = chosen.shape
    columns, width = key_columns(keys, chunk, chosen.device)
    tiles = -(-queries // tile)
    padded = torch.nn.functional.pad(chosen, (0, 0, 0, -queries % tile))
    rows = padded.view(batch, heads, tiles, tile, chunks).transpose(-1, -2)
    real = torch.arange(tiles * tile, device=chosen.device).view(tiles, 1, tile) < queries
    some, every = rows.any(-1), (rows | ~real).all(-1)
    partial = some & ~every
    distinct, which = unique_rows(pack_bits(rows[partial]))
    kinds = torch.full(some.shape, FULL, device=chosen.device)
    kinds[partial] = which
    present = some[..., columns].flatten(0, 2)
    return BlockLayout(
        indptr=torch.nn.functional.pad(present.sum(1).cumsum(0), (1, 0)),
        indices=present.nonzero()[:, 1].int(),
        kinds=kinds[..., columns].flatten(0, 2)[present].int(),
        bits=spread_rows(distinct, tile, width),
        batch=batch, heads=heads, queries=queries, keys=keys, block=(tile, width),
    )  # fmt: skip
