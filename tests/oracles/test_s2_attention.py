"""S2-Attention against the rule of its paper, block by block, and dense softmax."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.s2_attention import S2Attention
from saccade.types import Geometry


def dense_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over True pairs, in fp64."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -float("inf")).softmax(-1) @ v


def oracle_mask(shards, queries, keys, stride, local, block, offset, causal):
    """Head by head and pair by pair; `shards` numbers the shard of each head, out of max + 1."""
    step = max(1, stride // (max(shards) + 1))
    mask = torch.zeros(len(shards), queries, keys, dtype=torch.bool)
    for h, shard in enumerate(shards):
        for i in range(queries):
            for j in range(keys):
                place = i + keys - queries
                row, column = place // block, j // block
                near = row - column < local if column <= row else (column - row < local and not causal)
                kept = near or (column + shard * step + offset) % stride == 0
                mask[h, i, j] = kept and not (causal and j > place)
    return mask


def inputs(queries, keys, heads=4, groups=2, batch=2):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, 8, dtype=torch.float64)
    return q, *(torch.randn(batch, groups, keys, 8, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [3, 41, 64])
@pytest.mark.parametrize(
    ("stride", "local", "block", "offset"), [(3, 1, 4, 0), (4, 2, 4, 1), (8, 1, 8, 3), (16, 3, 2, 0)]
)
def test_equals_the_masked_dense(causal, keys, stride, local, block, offset):
    q, k, v = inputs(keys, keys)
    out = S2Attention(stride, local, block, offset)(q, k, v, geometry=Geometry(causal=causal))
    mask = oracle_mask([0, 1, 2, 3], keys, keys, stride, local, block, offset, causal)
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)


@pytest.mark.parametrize("queries", [1, 10, 32, 47])
def test_fewer_queries_than_keys_over_a_cache(queries):
    q, k, v = inputs(queries, 50)
    out = S2Attention(4, 2, 8)(q, k, v, geometry=Geometry(causal=True))
    mask = oracle_mask([0, 1, 2, 3], queries, 50, 4, 2, 8, 0, causal=True)
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "shards"), [({"homogeneous": True}, [0, 0, 0, 0]), ({"per_key_head": True}, [0, 0, 1, 1])]
)
def test_heads_that_share_a_shard(settings, shards):
    q, k, v = inputs(40, 40)
    out = S2Attention(4, 1, 4, 1, **settings)(q, k, v, geometry=Geometry(causal=True))
    mask = oracle_mask(shards, 40, 40, 4, 1, 4, 1, causal=True)
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)


def test_known_pattern():
    """Blocks of one token, stride 3, two heads: head 0 keeps 0 and 3, head 1 keeps 2 and 5."""
    mask = S2Attention(3, 1, 1).pattern(*[torch.zeros(1, 2, 6, 4)] * 2, Geometry(causal=True)).to_dense()[0]
    assert mask[0, 5].int().tolist() == [1, 0, 0, 1, 0, 1]
    assert mask[1, 4].int().tolist() == [0, 0, 1, 0, 1, 0]


def test_the_shards_cover_the_context():
    mask = S2Attention(4, 1, 2).pattern(*[torch.zeros(1, 4, 32, 4)] * 2, Geometry(causal=True)).to_dense()[0]
    assert torch.equal(mask.any(0), torch.ones(32, 32, dtype=torch.bool).tril())
    assert int(mask.sum(0)[31, :28].max()) == 1  # no block beyond the local one is kept twice


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, "stride=0: expected"),
        ({"local_blocks": 0}, "local_blocks=0: expected"),
        ({"block": 0}, "block=0: expected"),
        ({"stride": 4, "offset": 4}, r"offset=4: expected blocks in \[0, stride=4\)"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        S2Attention(**settings)
