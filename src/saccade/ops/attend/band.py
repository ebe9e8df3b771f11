"""Bands: causality and windows as `(left, right)`, and the chunks of queries the portable engine works through.

Query i stands at place i + N - M. It sees the keys at distance `place - j` in [-right, left]; -1 = unbounded on that
side, so causal alone is `(-1, 0)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BANDED_ROWS = 256
"""Most queries per chunk where a band lets a chunk skip keys: fewer skip more, but cost more calls."""


class Chunk(NamedTuple):
    """Queries [start, stop) and the keys [low, high) that at least one of them may see."""

    start: int
    stop: int
    low: int
    high: int


def band(causal: bool, window: tuple[int, int] | None, queries: int, keys: int) -> tuple[int, int]:
    """`causal` and `window` as one `(left, right)`, a side that hides nothing at these sizes as -1."""
    left, right = (-1, -1) if window is None else window
    if causal:
        right = 0
    return (-1 if left >= keys - 1 else left), (-1 if right >= queries - 1 else right)


def chunk_rows(row_bytes: int, queries: int, left: int, right: int, workspace: int) -> int:
    """Queries per chunk such that temporaries of `row_bytes` per query and key fit in `workspace` bytes."""
    rows = max(1, workspace // max(1, row_bytes))
    if left >= 0 and right >= 0:
        rows = min(rows, max(64, min(BANDED_ROWS, left + right + 1)))
    elif left >= 0 or right >= 0:
        rows = min(rows, BANDED_ROWS)
    return min(rows, max(queries, 1))


def chunks(queries: int, keys: int, left: int, right: int, rows: int) -> Iterator[Chunk]:
    """Consecutive chunks of `rows` queries; `low == high` where none of them sees a key."""
    offset = keys - queries
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        low = 0 if left < 0 else min(max(start + offset - left, 0), keys)
        high = keys if right < 0 else min(max(stop + offset + right, 0), keys)
        yield Chunk(start, stop, low, max(low, high))


def segment_span(chunk: Chunk, q_segments: Tensor, kv_segments: Tensor) -> Chunk:
    """`chunk` with its keys cut to the stretch that holds the segments of its queries."""
    ids, keys = q_segments[:, chunk.start : chunk.stop], kv_segments[:, chunk.low : chunk.high]
    lowest = torch.where(ids < 0, torch.iinfo(ids.dtype).max, ids).amin(1, keepdim=True)
    reached = ((keys >= lowest) & (keys <= ids.amax(1, keepdim=True))).any(0).nonzero()
    if not len(reached):
        return chunk._replace(high=chunk.low)
    return chunk._replace(low=chunk.low + int(reached[0]), high=chunk.low + int(reached[-1]) + 1)


def chunk_mask(
    chunk: Chunk, queries: int, keys: int, left: int, right: int, q_segments: Tensor | None,
    kv_segments: Tensor | None, device: torch.device,
) -> Tensor | None:  # fmt: skip
    """Bool `[B or 1, 1, m, n]` for the chunk, True = attend; None if every pair of it is kept."""
    start, stop, low, high = chunk
    offset = keys - queries
    cut_left = left >= 0 and stop - 1 + offset - low > left
    cut_right = right >= 0 and high - 1 - (start + offset) > right
    mask = None
    if cut_left or cut_right:
        place = torch.arange(start + offset, stop + offset, device=device)[:, None]
        key = torch.arange(low, high, device=device)
        mask = torch.ones(stop - start, high - low, dtype=torch.bool, device=device)
        mask = mask & (key >= place - left) if cut_left else mask
        mask = mask & (key <= place + right) if cut_right else mask
        mask = mask[None, None]
    if q_segments is not None and kv_segments is not None:
        ids = q_segments[:, None, start:stop, None]
        same = (ids == kv_segments[:, None, None, low:high]) & (ids >= 0)
        mask = same if mask is None else mask & same
    return mask


def band_pairs(queries: int, keys: int, left: int, right: int) -> int:
    """Number of pairs a band keeps."""
    place = torch.arange(queries) + keys - queries
    low = torch.zeros_like(place) if left < 0 else (place - left).clamp(min=0)
    high = torch.full_like(place, keys) if right < 0 else (place + right + 1).clamp(max=keys)
    return int((high - low).clamp(min=0).sum())


def density(
    queries: int, keys: int, left: int, right: int, q_segments: Tensor | None, kv_segments: Tensor | None
) -> float:
    """Fraction of the M x N pairs kept, the mean over the batch."""
    if queries * keys == 0:
        return 0.0
    if q_segments is None or kv_segments is None:
        return band_pairs(queries, keys, left, right) / (queries * keys)
    batch, kept = max(len(q_segments), len(kv_segments)), 0
    for chunk in chunks(queries, keys, left, right, max(1, 2**22 // (keys * batch))):
        mask = chunk_mask(chunk, queries, keys, left, right, q_segments, kv_segments, q_segments.device)
        kept += 0 if mask is None else int(mask.sum()) * batch // mask.shape[0]
    return kept / (batch * queries * keys)
