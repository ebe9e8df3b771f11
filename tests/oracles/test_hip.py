"""HiP against algorithm 1 of the paper, one query block and one range at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where.hip import HiP
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def random_qkv(batch: int, heads: int, groups: int, queries: int, keys: int, dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = ((batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim + 1))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def tree_search(asked: Tensor, k: Tensor, start: int, stop: int, ranges: int, mechanism: HiP) -> set[int]:
    """Blocks found in [start, stop): split evenly, halve, score the block at each half's centre, keep the best."""
    length = stop - start
    nodes = [(start + length * n // ranges, start + length * (n + 1) // ranges) for n in range(ranges)]
    nodes = [node for node in nodes if node[0] < node[1]]
    while any(right - left > 1 for left, right in nodes):
        halves = []
        for left, right in nodes:
            middle = (left + right + 1) // 2
            halves += [(left, middle), (middle, right)] if middle < right else [(left, right)]
        scores = {}
        for left, right in halves:
            centre = (left + right) // 2 * mechanism.block_k
            tokens = range(centre, min(centre + mechanism.block_k, len(k)), mechanism.key_stride)
            scores[left, right] = float((asked @ k[list(tokens)].T).max())
        nodes = sorted(halves, key=lambda node: -scores[node])[:ranges]
    return {left for left, _ in nodes}


def oracle_mask(q: Tensor, k: Tensor, mechanism: HiP, causal: bool) -> Tensor:
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    size_q, size_k = mechanism.block_q, mechanism.block_k
    mask = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b, h, block in itertools.product(range(batch), range(heads), range(0, queries, size_q)):
        rows = range(block, min(block + size_q, queries))
        asked = q[b, h, list(rows)[:: mechanism.query_stride]]
        first = block + keys - queries
        sinks = min(-(-mechanism.sinks // size_k), -(-keys // size_k))
        stop = max((first - mechanism.window + 1) // size_k, sinks) if causal else -(-keys // size_k)
        ranges = -(-mechanism.budget // size_k)
        found = tree_search(asked, k[b, h * groups // heads], sinks, stop, ranges, mechanism)
        kept = [j // size_k in found or j // size_k < sinks or j // size_k >= stop for j in range(keys)]
        mask[b, h, list(rows)] = torch.tensor(kept)
    return mask.tril(keys - queries) if causal else mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1) @ v


SETTINGS = [
    {"budget": 8, "window": 4, "sinks": 2, "block_q": 8, "block_k": 4, "query_stride": 2, "key_stride": 2},
    {"budget": 12, "window": 7, "sinks": 0, "block_q": 16, "block_k": 4, "query_stride": 1, "key_stride": 1},
    {"budget": 9, "window": 1, "sinks": 4, "block_q": 4, "block_k": 3, "query_stride": 3, "key_stride": 3},
    {"budget": 1, "window": 5, "sinks": 1, "block_q": 5, "block_k": 2, "query_stride": 2, "key_stride": 1},
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 2, 64, 64), (1, 3, 1, 51, 51), (1, 2, 2, 13, 60), (1, 2, 1, 1, 40)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tree_search(settings: dict[str, int], shape: tuple[int, ...], causal: bool) -> None:
    q, k, v = random_qkv(*shape)
    mechanism, geometry = HiP(**settings), Geometry(causal=causal)
    mask = oracle_mask(q, k, mechanism, causal)
    layout = mechanism.pattern(q, k, geometry)
    layout.validate()
    assert torch.equal(layout.to_dense(), mask)
    torch.testing.assert_close(mechanism(q, k, v, geometry=geometry), attention(q, k, v, mask), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("peak", "block"), [(3, 0), (22, 5), (45, 11), (61, 15), (17, 3)])
def test_known_by_hand(peak: int, block: int) -> None:
    """Scores fall with the distance from `peak`: one range follows it down to its block.

    Unless it lies at a border: 17 is nearer to key 11, in the block at the centre of keys 0 .. 15, than to key 24, in
    that of keys 16 .. 31, and so the search takes the wrong half.
    """
    k = -(torch.arange(64.0) - peak).abs().view(1, 1, 64, 1)
    mechanism = HiP(budget=4, window=1, sinks=0, block_q=8, block_k=4, query_stride=1, key_stride=1)
    blocks = mechanism.pattern(torch.ones(1, 1, 8, 1), k, Geometry()).block_mask()[0, 0, 0]
    assert blocks.nonzero().flatten().tolist() == [block]


def test_choice_ignores_later_blocks() -> None:
    q, k, _ = random_qkv(1, 2, 2, 64, 64)
    changed_q, changed_k = q.clone(), k.clone()
    changed_q[:, :, 32:] += 3.0
    changed_k[:, :, 32:] = float("nan")
    mechanism = HiP(budget=8, window=4, sinks=2, block_q=8, block_k=4, query_stride=2, key_stride=2)
    before = mechanism.pattern(q, k, CAUSAL).to_dense()[:, :, :32]
    assert torch.equal(before, mechanism.pattern(changed_q, changed_k, CAUSAL).to_dense()[:, :, :32])


def test_every_query_sees_its_window_and_the_sinks() -> None:
    q, k, _ = random_qkv(1, 2, 1, 64, 64)
    mask = HiP(budget=4, window=10, sinks=3, block_q=8, block_k=4).pattern(q, k, CAUSAL).to_dense()
    for i in range(64):
        assert bool(mask[:, :, i, max(0, i - 9) : i + 1].all())
        assert bool(mask[:, :, i, : min(3, i + 1)].all())


@pytest.mark.parametrize("causal", [False, True])
def test_exact_setting_is_dense(causal: bool) -> None:
    q, k, _ = random_qkv(1, 2, 1, 70, 70)
    layout = HiP(**HiP.card.exact(70)).pattern(q, k, Geometry(causal=causal))
    assert layout.density(causal=causal) == 1.0


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 8), (5, 0)])
def test_no_tokens(queries: int, keys: int) -> None:
    q, k, v = random_qkv(1, 2, 1, queries, keys)
    out = HiP()(q, k, v, geometry=Geometry())
    assert torch.equal(out, torch.zeros(1, 2, queries, 9, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [64, 256])
def test_ladder_rises(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens, tokens)
    kept = [HiP(**s).pattern(q, k, CAUSAL).density(causal=True) for s in HiP.card.ladder(tokens)]
    assert all(low < high for low, high in zip(kept, kept[1:], strict=False))
    assert 0.05 < kept[0] < kept[-1] < 0.6


@pytest.mark.parametrize("name", ["budget", "window", "block_q", "block_k", "query_stride", "key_stride"])
def test_bad_setting(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: expected at least 1 token"):
        HiP(**{name: 0})


def test_bad_sinks() -> None:
    with pytest.raises(ValueError, match="sinks=-1: expected at least 0 tokens"):
        HiP(sinks=-1)
