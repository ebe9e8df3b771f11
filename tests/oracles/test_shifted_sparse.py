"""Shifted groups against LongLoRA's roll-and-split algorithm, and against a per-pair mask."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.shifted_sparse import ShiftedSparse
from saccade.types import Geometry


def dense_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over True pairs, in fp64; empty rows give 0."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def oracle_mask(heads, queries, keys, group, sinks, causal, first_shifted, segments=None):
    """The groups by their bounds: [0, g), [g, 2g) ... and, shifted, [0, g/2), [g/2, 3g/2) ..."""
    mask = torch.zeros(heads, queries, keys, dtype=torch.bool)
    ids = [0] * keys if segments is None else segments
    place = [sum(other == ids[j] for other in ids[:j]) for j in range(keys)]
    for h in range(heads):
        bounds = list(range(0, keys + group, group)) if h < first_shifted else [
            0, *range(group // 2, keys + group, group)
        ]  # fmt: skip
        where = [max(n for n, bound in enumerate(bounds) if bound <= p) for p in place]
        for i in range(queries):
            at = i + keys - queries
            for j in range(keys):
                seen = where[at] == where[j] or place[j] < sinks or (not causal and place[at] < sinks)
                mask[h, i, j] = seen and ids[at] == ids[j] and ids[j] >= 0 and not (causal and j > at)
    return mask


def inputs(queries, keys, heads=4, groups=2, batch=2):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, 8, dtype=torch.float64)
    return q, *(torch.randn(batch, groups, keys, 8, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [1, 29, 64])
@pytest.mark.parametrize(("group", "sinks", "block"), [(2, 0, 8), (8, 3, 8), (12, 1, 16), (40, 5, 4)])
def test_equals_the_masked_dense(causal, keys, group, sinks, block):
    q, k, v = inputs(keys, keys)
    out = ShiftedSparse(group, 0.5, sinks, block)(q, k, v, geometry=Geometry(causal=causal))
    wanted = dense_attention(q, k, v, oracle_mask(4, keys, keys, group, sinks, causal, 2))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)


def test_equals_rolling_and_splitting_into_groups():
    """LongLoRA: roll half of the heads by half a group, attend within groups, roll back; bar the wrapped group."""
    tokens, group, heads = 48, 16, 4
    q, k, v = inputs(tokens, tokens, heads, heads)
    rolled = []
    for tensor in (q, k, v):
        x = tensor.clone()
        x[:, heads // 2 :] = x[:, heads // 2 :].roll(-group // 2, 2)
        rolled.append(x.view(2, heads, tokens // group, group, 8))
    scores = rolled[0] @ rolled[1].mT / 8**0.5
    scores = scores.masked_fill(~torch.ones(group, group, dtype=torch.bool).tril(), -float("inf"))
    wanted = (scores.softmax(-1) @ rolled[2]).view(2, heads, tokens, 8)
    wanted[:, heads // 2 :] = wanted[:, heads // 2 :].roll(group // 2, 2)
    out = ShiftedSparse(group, 0.5, 0, 8)(q, k, v, geometry=Geometry(causal=True))
    torch.testing.assert_close(out[:, :2], wanted[:, :2], rtol=0, atol=1e-10)
    inner = slice(group // 2, None)
    torch.testing.assert_close(out[:, 2:, inner], wanted[:, 2:, inner], rtol=0, atol=1e-10)
    assert not torch.allclose(out[:, 2:, : group // 2], wanted[:, 2:, : group // 2])  # there theirs sees the future


@pytest.mark.parametrize(("shifted", "first"), [(0.0, 5), (0.2, 4), (0.5, 2), (0.9, 0), (1.0, 0)])
def test_share_of_shifted_heads(shifted, first):
    chosen = ShiftedSparse(8, shifted, 0, 4).pattern(*[torch.zeros(1, 5, 20, 4)] * 2, Geometry(causal=True))
    mask = chosen.to_dense()[0]
    assert torch.equal(mask, oracle_mask(5, 20, 20, 8, 0, causal=True, first_shifted=first))


@pytest.mark.parametrize("queries", [1, 10, 33])
def test_fewer_queries_than_keys_over_a_cache(queries):
    q, k, v = inputs(queries, 50)
    out = ShiftedSparse(12, 0.5, 3, 8)(q, k, v, geometry=Geometry(causal=True))
    wanted = dense_attention(q, k, v, oracle_mask(4, queries, 50, 12, 3, causal=True, first_shifted=2))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_every_packed_sequence_has_its_own_groups(causal):
    rows = [[0] * 13 + [1] * 20, [-1] * 6 + [0] * 9 + [3] * 18]
    q, k, v = inputs(33, 33)
    ids = torch.tensor(rows)
    out = ShiftedSparse(6, 0.5, 2, 8)(q, k, v, geometry=Geometry(causal=causal, q_segments=ids, kv_segments=ids))
    mask = torch.stack([oracle_mask(4, 33, 33, 6, 2, causal, 2, row) for row in rows])
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 7}, "group=7: expected an even"),
        ({"group": 0}, "group=0: expected"),
        ({"shifted": 1.5}, r"shifted=1\.5: expected"),
        ({"sinks": -1}, "sinks=-1: expected"),
        ({"block": 0}, "block=0: expected"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        ShiftedSparse(**settings)
