"""H2O against a dictionary per head, one token at a time, from the paper's Algorithm 1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.h2o import H2O

pytestmark = pytest.mark.quick


def oracle(q: Tensor, k: Tensor, v: Tensor, chunks: list[int], heavy: int, recent: int) -> tuple[Tensor, list]:
    """For each sequence and key/value head: a dict position -> accumulated attention is the cache."""
    batch, heads, tokens, dim = q.shape
    groups = k.shape[1]
    share = heads // groups
    out = torch.zeros(batch, heads, tokens, v.shape[3], dtype=q.dtype)
    kept = []
    for b in range(batch):
        for g in range(groups):
            cache: dict[int, float] = {}
            start = 0
            for size in chunks:
                for i in range(start, start + size):
                    cache[i] = 0.0
                for i in range(start, start + size):
                    seen = [j for j in sorted(cache) if j <= i]
                    for h in range(g * share, (g + 1) * share):
                        weights = [math.exp(float(q[b, h, i] @ k[b, g, j]) / math.sqrt(dim)) for j in seen]
                        total = sum(weights)
                        for j, weight in zip(seen, weights, strict=True):
                            cache[j] += weight / total
                            out[b, h, i] += weight / total * v[b, g, j]
                start += size
                if len(cache) > heavy + recent:
                    order = sorted(cache)
                    old, new = order[: len(order) - recent], order[len(order) - recent :]
                    best = sorted(old, key=lambda j: -cache[j])[:heavy]
                    cache = {j: cache[j] for j in sorted(best) + new}
            kept.append((b, g, sorted(cache), cache))
    return out, kept


def inputs(batch: int, heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, 8), (batch, groups, tokens, 8), (batch, groups, tokens, 5))
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("heads", "groups", "chunks", "heavy", "recent"),
    [
        (2, 2, [1] * 17, 4, 4),
        (4, 2, [9, 1, 1, 1, 1, 1, 3, 1], 3, 4),
        (6, 1, [13, 1, 1], 5, 0),
        (2, 1, [7, 6, 1, 1], 0, 3),
        (2, 2, [8, 1, 1], 4, 40),
    ],
)
def test_matches_the_oracle(heads: int, groups: int, chunks: list[int], heavy: int, recent: int) -> None:
    q, k, v = inputs(2, heads, groups, sum(chunks))
    expected, kept = oracle(q, k, v, chunks, heavy, recent)
    layer = CachedAttention(H2O(heavy=heavy, recent=recent))
    parts = zip(q.split(chunks, 2), k.split(chunks, 2), v.split(chunks, 2), strict=True)
    out = torch.cat([layer(*part) for part in parts], 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    layer.kept.sort()
    for b, g, places, scores in kept:
        assert layer.kept.positions[b, g].tolist() == places
        expected_scores = torch.tensor([scores[j] for j in places], dtype=torch.float64)
        torch.testing.assert_close(layer.kept.stat("attention")[b, g], expected_scores, rtol=0, atol=1e-10)
        assert torch.equal(layer.kept.keys[b, g], k[b, g, places])


def test_by_hand() -> None:
    """Every query looks only at token 1, so token 1 is the heavy hitter; the rest is the last two tokens."""
    tokens = 6
    k = torch.zeros(1, 1, tokens, 2, dtype=torch.float64)
    k[0, 0, 1, 0] = 2000.0
    q = torch.ones(1, 1, tokens, 2, dtype=torch.float64)
    v = torch.arange(tokens, dtype=torch.float64).view(1, 1, tokens, 1)
    layer = CachedAttention(H2O(heavy=1, recent=2))
    out = layer(q, k, v)
    assert out.flatten().tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    layer.kept.sort()
    assert layer.kept.positions.flatten().tolist() == [1, 4, 5]
    assert layer.kept.stat("attention").flatten().tolist() == [5.0, 0.0, 0.0]


def test_at_full_budget_dense_in_any_chunks() -> None:
    q, k, v = inputs(2, 4, 2, 12)
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)
    scores = scores.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    for chunks in ([12], [5, 4, 3], [1] * 12):
        layer = CachedAttention(H2O(**H2O.card.exact(12)))
        parts = zip(q.split(chunks, 2), k.split(chunks, 2), v.split(chunks, 2), strict=True)
        torch.testing.assert_close(torch.cat([layer(*part) for part in parts], 2), expected, rtol=0, atol=1e-12)


def test_memory_is_freed_and_stays_bounded() -> None:
    q, k, v = inputs(1, 2, 2, 130)
    layer = CachedAttention(H2O(heavy=3, recent=2))
    page = 64 * (8 + 5 + 1) * 8 + 64 * 4
    layer.kept.append(k, v)
    assert layer.nbytes == 3 * 2 * page
    layer.reset()
    layer(q[:, :, :120], k[:, :, :120], v[:, :, :120])
    assert layer.nbytes == 2 * page
    for i in range(120, 130):
        layer(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1])
        assert layer.nbytes == 2 * page
        assert layer.kept.lengths.tolist() == [[5, 5]]
        assert layer.bytes_read == 6 * 2 * 13 * 8


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="heavy=-1: expected at least 0 tokens"):
        H2O(heavy=-1)
    with pytest.raises(ValueError, match="recent=-2: expected at least 0 tokens"):
        H2O(recent=-2)
    with pytest.raises(ValueError, match=r"heavy \+ recent=0: expected at least 1 token"):
        H2O(heavy=0, recent=0)
