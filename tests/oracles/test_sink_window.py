"""Sink + window against a per-pair mask and dense softmax."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.sink_window import SinkWindow
from saccade.types import Geometry

pytestmark = pytest.mark.quick


def dense_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over True pairs, in fp64; empty rows give 0."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def oracle_mask(queries, keys, window, sinks, causal, segments=None):
    """Pair by pair; `segments` is a list of ids per key of one sequence."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        place = i + keys - queries
        for j in range(keys):
            before = j
            if segments is not None:
                if segments[j] != segments[place] or segments[j] < 0:
                    continue
                before = sum(other == segments[j] for other in segments[:j])
            near = abs(place - j) < window
            mask[i, j] = (near or before < sinks) and not (causal and j > place)
    return mask


def inputs(queries, keys, heads=4, groups=2, batch=2):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, 8, dtype=torch.float64)
    return q, *(torch.randn(batch, groups, keys, 8, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [1, 31, 67])
@pytest.mark.parametrize(("window", "sinks", "block"), [(1, 0, 8), (5, 3, 8), (9, 20, 16), (100, 2, 4)])
def test_equals_the_masked_dense(causal, keys, window, sinks, block):
    q, k, v = inputs(keys, keys)
    out = SinkWindow(window, sinks, block)(q, k, v, geometry=Geometry(causal=causal))
    wanted = dense_attention(q, k, v, oracle_mask(keys, keys, window, sinks, causal))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("queries", [1, 10, 33])
def test_fewer_queries_than_keys_over_a_cache(queries):
    q, k, v = inputs(queries, 50)
    out = SinkWindow(7, 3, 8)(q, k, v, geometry=Geometry(causal=True))
    wanted = dense_attention(q, k, v, oracle_mask(queries, 50, 7, 3, causal=True))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)


def test_every_packed_sequence_has_its_own_sinks():
    rows = [[0] * 13 + [1] * 20, [-1] * 6 + [0] * 9 + [3] * 18]
    q, k, v = inputs(33, 33)
    ids = torch.tensor(rows)
    out = SinkWindow(4, 2, 8)(q, k, v, geometry=Geometry(causal=True, q_segments=ids, kv_segments=ids))
    mask = torch.stack([oracle_mask(33, 33, 4, 2, causal=True, segments=row) for row in rows])[:, None]
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)


def test_known_pattern():
    mask = SinkWindow(2, 1, 2).pattern(*[torch.zeros(1, 1, 5, 4)] * 2, Geometry(causal=True)).to_dense()[0, 0]
    wanted = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
    assert mask.int().tolist() == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"window": 0}, "window=0: expected"), ({"sinks": -1}, "sinks=-1: expected"), ({"block": 0}, "block=0: expected")],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        SinkWindow(**settings)
