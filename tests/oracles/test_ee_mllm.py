"""Composite attention against a per-pair mask: text sees all, the image sees nothing."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.ee_mllm import CompositeAttention
from saccade.types import Geometry


def oracle_mask(queries, keys, prefix, cells, causal):
    """Pair by pair."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        place = i + keys - queries
        visual = prefix <= place < prefix + cells
        for j in range(keys):
            mask[i, j] = not visual and not (causal and j > place)
    return mask


def dense_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over True pairs, in fp64; empty rows give 0."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def inputs(queries, keys, batch=2, heads=4, groups=2):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, 8, dtype=torch.float64)
    return q, *(torch.randn(batch, groups, keys, 8, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("grid", "prefix", "suffix", "block"),
    [((4, 5), 3, 14, 8), ((3, 3, 2), 0, 5, 4), ((21,), 7, 0, 16), ((2, 3), 0, 0, 4), ((5, 5), 33, 40, 16)],
)
def test_equals_the_masked_dense(grid, prefix, suffix, block, causal):
    geometry = Geometry(causal=causal, grid=grid, prefix=prefix, suffix=suffix)
    cells = geometry.grid_tokens
    tokens = prefix + cells + suffix
    q, k, v = inputs(tokens, tokens)
    mask = oracle_mask(tokens, tokens, prefix, cells, causal)
    mechanism = CompositeAttention(block)
    assert torch.equal(mechanism.pattern(q, k, geometry).to_dense()[0, 0], mask)
    out = mechanism(q, k, v, geometry=geometry)
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)


@pytest.mark.parametrize("queries", [1, 9, 20, 37])
def test_fewer_queries_than_keys_over_a_cache(queries):
    geometry = Geometry(causal=True, grid=(4, 5), prefix=6, suffix=13)
    q, k, v = inputs(queries, 39)
    out = CompositeAttention(8)(q, k, v, geometry=geometry)
    wanted = dense_attention(q, k, v, oracle_mask(queries, 39, 6, 20, causal=True))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)


def test_known_pattern():
    """One token of text, an image of two, one token of text."""
    geometry = Geometry(causal=True, grid=(1, 2), prefix=1, suffix=1)
    mask = CompositeAttention(2).pattern(*[torch.zeros(1, 1, 4, 4)] * 2, geometry).to_dense()[0, 0]
    assert mask.int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="block=0: expected at least 1"):
        CompositeAttention(0)
    q = torch.zeros(1, 1, 12, 4)
    with pytest.raises(ValueError, match="tokens=12: expected 9, the tokens of"):
        CompositeAttention()(q, q, q, geometry=Geometry(grid=(2, 3), prefix=3))
