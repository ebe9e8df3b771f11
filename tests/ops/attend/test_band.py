"""Bands and chunks: every visible pair is in its chunk, and windows and segments skip what no query of a chunk sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.ops.attend.band import Chunk, band, band_pairs, chunk_mask, chunk_rows, chunks, density, segment_span

pytestmark = pytest.mark.quick

SMALL = settings(max_examples=80, deadline=None, derandomize=True)
SIDE = st.integers(-1, 12)


def dense(queries: int, keys: int, left: int, right: int) -> torch.Tensor:
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    return ((distance <= left) | (left < 0)) & ((distance >= -right) | (right < 0))


@SMALL
@given(st.integers(1, 12), st.integers(1, 12), SIDE, SIDE, st.integers(1, 5))
def test_chunks_hold_every_visible_pair_and_no_more_keys_than_needed(queries, keys, left, right, rows):
    expected, built = dense(queries, keys, left, right), torch.zeros(queries, keys, dtype=torch.bool)
    for chunk in chunks(queries, keys, left, right, rows):
        mask = chunk_mask(chunk, queries, keys, left, right, None, None, torch.device("cpu"))
        part = built[chunk.start : chunk.stop, chunk.low : chunk.high]
        part |= torch.ones_like(part) if mask is None else mask[0, 0]
        seen = expected[chunk.start : chunk.stop].any(0).nonzero()[:, 0]
        assert (chunk.low, chunk.high) == (int(seen[0]), int(seen[-1]) + 1) if len(seen) else chunk.low == chunk.high
    assert torch.equal(built, expected)
    assert band_pairs(queries, keys, left, right) == int(expected.sum())


@SMALL
@given(st.integers(1, 12), st.integers(1, 12), SIDE, SIDE, st.booleans())
def test_band_joins_causality_and_window(queries, keys, left, right, causal):
    joined = dense(queries, keys, *band(causal, (left, right), queries, keys))
    expected = dense(queries, keys, left, right)
    expected = expected & dense(queries, keys, -1, 0) if causal and right != 0 else expected
    if causal and right > 0:
        expected = dense(queries, keys, left, 0)
    assert torch.equal(joined, expected)


def test_band_drops_sides_that_hide_nothing():
    assert band(causal=True, window=None, queries=1, keys=9) == (-1, -1)
    assert band(causal=False, window=(8, 3), queries=4, keys=9) == (-1, -1)
    assert band(causal=False, window=(7, 2), queries=4, keys=9) == (7, 2)


def test_rows_follow_the_workspace():
    assert chunk_rows(100, 1000, -1, -1, 1050) == 10
    assert chunk_rows(100, 1000, -1, -1, 1) == 1
    assert chunk_rows(1, 50, -1, -1, 10**9) == 50
    assert chunk_rows(1, 10**6, -1, 0, 10**9) == 256
    assert chunk_rows(1, 10**6, 10, 0, 10**9) == 64


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((0, 2), Chunk(0, 2, 0, 3)),
        ((2, 4), Chunk(2, 4, 3, 5)),
        ((1, 3), Chunk(1, 3, 0, 5)),
        ((4, 5), Chunk(4, 5, 0, 0)),
    ],
)
def test_segments_narrow_the_keys(rows, expected):
    q_ids, kv_ids = torch.tensor([[0, 0, 1, 1, -1]]), torch.tensor([[0, 0, 0, 1, 1, 2, -1]])
    assert segment_span(Chunk(*rows, 0, 7), q_ids, kv_ids) == expected


def test_segment_density_is_the_mean_over_the_batch():
    q_ids, kv_ids = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1], [0, 0, 0]])
    assert density(3, 3, -1, -1, q_ids, kv_ids) == pytest.approx((4 + 6) / 18)
    assert density(0, 3, -1, -1, None, None) == 0.0
