"""TOVA against a list of kept tokens per layer, from the paper's section 3.3."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.tova import TOVA

pytestmark = pytest.mark.quick


def oracle(q: Tensor, k: Tensor, v: Tensor, chunks: list[int], tokens: int) -> tuple[Tensor, list[int]]:
    """One sequence: outputs `[H, N, E]` and the positions that are left, the same for all heads."""
    heads, count, dim = q.shape
    share = heads // k.shape[0]
    out = torch.zeros(heads, count, v.shape[2], dtype=q.dtype)
    cache: list[int] = []
    start = 0
    for size in chunks:
        cache += range(start, start + size)
        mean = dict.fromkeys(cache, 0.0)
        for i in range(start, start + size):
            seen = [j for j in cache if j <= i]
            for h in range(heads):
                scores = [math.exp(float(q[h, i] @ k[h // share, j]) / math.sqrt(dim)) for j in seen]
                for j, score in zip(seen, scores, strict=True):
                    out[h, i] += score / sum(scores) * v[h // share, j]
                    if i == start + size - 1:
                        mean[j] += score / sum(scores) / heads
        start += size
        cache = sorted(sorted(cache, key=lambda j: -mean[j])[:tokens])
    return out, cache


def inputs(batch: int, heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, 8), (batch, groups, tokens, 8), (batch, groups, tokens, 5))
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("heads", "groups", "chunks", "tokens"),
    [(2, 2, [1] * 17, 5), (4, 2, [9, 1, 1, 4, 1, 1], 4), (6, 1, [13, 1, 1], 1), (2, 1, [7, 6, 2], 14)],
)
def test_matches_the_oracle(heads: int, groups: int, chunks: list[int], tokens: int) -> None:
    q, k, v = inputs(2, heads, groups, sum(chunks))
    layer = CachedAttention(TOVA(tokens=tokens))
    parts = zip(q.split(chunks, 2), k.split(chunks, 2), v.split(chunks, 2), strict=True)
    out = torch.cat([layer(*part) for part in parts], 2)
    layer.kept.sort()
    for b in range(2):
        expected, kept = oracle(q[b], k[b], v[b], chunks, tokens)
        torch.testing.assert_close(out[b], expected, rtol=0, atol=1e-10)
        assert layer.kept.positions[b].tolist() == [kept] * groups


def test_by_hand() -> None:
    """The newest query looks at token 1 in one head and at token 3 in the other, which more of its weight goes to."""
    k = torch.zeros(1, 2, 5, 2, dtype=torch.float64)
    k[0, 0, 1, 0], k[0, 1, 3, 0] = 3.0, 4.0
    q = torch.ones(1, 2, 5, 2, dtype=torch.float64)
    for tokens, expected in ((1, [3]), (2, [1, 3]), (3, [0, 1, 3])):
        layer = CachedAttention(TOVA(tokens=tokens))
        layer(q, k, k)
        layer.kept.sort()
        assert layer.kept.positions.tolist() == [[expected] * 2]


def test_left_padded_equals_alone() -> None:
    q, k, v = inputs(2, 4, 2, 14)
    present = torch.ones(2, 9, dtype=torch.bool)
    present[1, :6] = False
    padded, alone = CachedAttention(TOVA(tokens=4)), CachedAttention(TOVA(tokens=4))
    padded(*(x[:, :, :9] for x in (q, k, v)), present=present)
    alone(*(x[1:, :, 6:9] for x in (q, k, v)))
    for i in range(9, 14):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        torch.testing.assert_close(padded(*token)[1:], alone(*(x[1:] for x in token)), rtol=0, atol=1e-12)
    assert padded.kept.lengths.tolist() == [[4, 4], [4, 4]]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="tokens=0: expected at least 1 token"):
        TOVA(tokens=0)
