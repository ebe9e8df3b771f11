"""BigBird: which blocks are fixed, what the random ones must obey, and dense softmax over the result."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.bigbird import BigBird
from saccade.types import Geometry


def dense_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over True pairs, in fp64."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -float("inf")).softmax(-1) @ v


def fixed_blocks(count, window, edge, causal):
    """Window and globals, bool `[count, count]`, by the paper's definition."""
    fixed = torch.zeros(count, count, dtype=torch.bool)
    for i in range(count):
        for j in range(count):
            first_or_last = j < edge or (not causal and (j >= count - edge or i < edge or i >= count - edge))
            fixed[i, j] = (abs(i - j) <= window or first_or_last) and not (causal and j > i)
    return fixed


def scramble(value):
    """The hash whose stream picks the random blocks, in plain Python integers."""
    value &= 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x045D9F3B) & 0xFFFFFFFF
    return value ^ (value >> 16)


def random_blocks(head, row, fixed, causal, count, seed):
    """Draw without replacement from a real list of the blocks that are left."""
    left = [j for j in range(len(fixed)) if not fixed[row, j] and not (causal and j > row)]
    drawn = []
    for draw in range(count):
        if left:
            state = scramble(scramble(scramble(head + seed * 8191) + row) + draw)
            drawn.append(left.pop(state % len(left)))
    return drawn


def oracle_mask(heads, queries, keys, settings, causal):
    window, random, edge, block, seed = settings
    count = -(-keys // block)
    fixed = fixed_blocks(count, window, edge, causal)
    mask = torch.zeros(heads, queries, keys, dtype=torch.bool)
    for h in range(heads):
        blocks = fixed.clone()
        for row in range(count):
            blocks[row, random_blocks(h, row, fixed, causal, random, seed)] = True
        for i in range(queries):
            place = i + keys - queries
            for j in range(keys):
                mask[h, i, j] = bool(blocks[place // block, j // block]) and not (causal and j > place)
    return mask


def inputs(queries, keys, heads=4, groups=2, batch=2):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, 8, dtype=torch.float64)
    return q, *(torch.randn(batch, groups, keys, 8, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [3, 41, 64])
@pytest.mark.parametrize(
    "settings", [(1, 2, 1, 4, 0), (0, 3, 2, 4, 5), (2, 0, 1, 8, 0), (0, 1, 0, 2, 1), (1, 40, 1, 4, 0)]
)
def test_equals_the_masked_dense(causal, keys, settings):
    q, k, v = inputs(keys, keys)
    out = BigBird(*settings)(q, k, v, geometry=Geometry(causal=causal))
    wanted = dense_attention(q, k, v, oracle_mask(4, keys, keys, settings, causal))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("queries", [1, 10, 32, 47])
def test_fewer_queries_than_keys_over_a_cache(queries):
    q, k, v = inputs(queries, 50)
    out = BigBird(1, 2, 1, 4)(q, k, v, geometry=Geometry(causal=True))
    wanted = dense_attention(q, k, v, oracle_mask(4, queries, 50, (1, 2, 1, 4, 0), causal=True))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_random_blocks_are_as_many_as_asked_distinct_and_elsewhere(causal):
    count, random = 24, 3
    q = torch.zeros(1, 8, 2 * count, 4)
    blocks = BigBird(1, random, 1, 2).pattern(q, q, Geometry(causal=causal)).block_mask()[0]
    fixed = fixed_blocks(count, 1, 1, causal)
    assert bool((blocks & fixed == fixed).all())
    others = (blocks & ~fixed).sum(-1)
    left = torch.ones(count, count, dtype=torch.bool)
    room = ((left.tril() if causal else left) & ~fixed).sum(-1)
    assert torch.equal(others, room.clamp(max=random).expand(8, -1))


def test_random_blocks_are_uniform():
    """Over 4,000 heads, each of the 16 free blocks of row 10 is drawn 2 / 16 of the time (5 standard deviations)."""
    q = torch.zeros(1, 4000, 21, 1)
    blocks = BigBird(1, 2, 1, 1).pattern(q, q).block_mask()[0, :, 10]
    share = blocks[:, ~fixed_blocks(21, 1, 1, causal=False)[10]].double().mean(0)
    assert len(share) == 16
    assert float((share - 2 / 16).abs().max()) < 5 * (2 / 16 * 14 / 16 / 4000) ** 0.5


def test_seeds_and_heads_differ_and_repeat():
    q = torch.zeros(1, 2, 64, 4)
    masks = [BigBird(0, 2, 1, 2, seed).pattern(q, q).block_mask()[0] for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][0], masks[0][1])


def test_causal_choice_does_not_depend_on_the_length():
    short, long = (torch.zeros(1, 2, n, 4) for n in (40, 64))
    causal = Geometry(causal=True)
    masks = [BigBird(1, 2, 1, 4).pattern(x, x, causal).to_dense()[..., :40, :40] for x in (short, long)]
    assert torch.equal(*masks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": -1}, "window=-1: expected"),
        ({"random": -2}, "random=-2: expected"),
        ({"global_blocks": -1}, "global_blocks=-1: expected"),
        ({"block": 0}, "block=0: expected"),
        ({"seed": -1}, "seed=-1: expected"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        BigBird(**settings)


def test_refuses_packed_sequences():
    q, ids = torch.zeros(1, 1, 8, 4), torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="q_segments: bigbird does not support"):
        BigBird()(q, q, q, geometry=Geometry(q_segments=ids, kv_segments=ids))
