"""KeyDiff against the paper's equations in loops: anchor, cosine, and the N least similar, block by block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.keydiff import KeyDiff

pytestmark = pytest.mark.quick


def similarity(k: Tensor, cache: list[int]) -> dict[int, float]:
    anchor = [0.0] * k.shape[1]
    for j in cache:
        length = math.sqrt(sum(float(x) ** 2 for x in k[j]))
        anchor = [a + float(x) / length / len(cache) for a, x in zip(anchor, k[j], strict=True)]
    size = math.sqrt(sum(a**2 for a in anchor))
    return {
        j: sum(a * float(x) for a, x in zip(anchor, k[j], strict=True)) / size / float(k[j].norm()) for j in cache
    }  # fmt: skip


def oracle(q: Tensor, k: Tensor, v: Tensor, blocks: list[int], tokens: int) -> tuple[Tensor, list[int]]:
    """One query head and its key/value head: outputs `[N, E]` and the positions that are left."""
    out, cache, start = torch.zeros(len(q), v.shape[1], dtype=q.dtype), [], 0
    for size in blocks:
        cache += range(start, start + size)
        for i in range(start, start + size):
            seen = [j for j in cache if j <= i]
            out[i] = (k[seen] @ q[i] / math.sqrt(len(q[i]))).softmax(0) @ v[seen]
        start += size
        if len(cache) > tokens:
            like = similarity(k, cache)
            cache = sorted(sorted(cache, key=lambda j: like[j])[:tokens])
    return out, cache


@pytest.mark.parametrize(("blocks", "tokens"), [([1] * 15, 5), ([6, 6, 1, 1, 1], 4), ([13, 1, 1], 2), ([7, 8], 14)])
def test_matches_the_oracle(blocks: list[int], tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (2 * torch.randn(2, h, 15, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    layer = CachedAttention(KeyDiff(tokens=tokens))
    parts = zip(q.split(blocks, 2), k.split(blocks, 2), v.split(blocks, 2), strict=True)
    out = torch.cat([layer(*part) for part in parts], 2)
    layer.kept.sort()
    for b in range(2):
        for h in range(4):
            expected, kept = oracle(q[b, h], k[b, h // 2], v[b, h // 2], blocks, tokens)
            torch.testing.assert_close(out[b, h], expected, rtol=0, atol=1e-10)
            assert layer.kept.positions[b, h // 2].tolist() == kept


def test_by_hand() -> None:
    """Three keys point east at any length, one north, one west: the west one differs most, then the north one."""
    k = torch.tensor([[1.0, 0.0], [0.0, 2.0], [30.0, 0.0], [-1.0, 0.0], [4.0, 0.0]], dtype=torch.float64)[None, None]
    for tokens, expected in ((1, [3]), (2, [1, 3]), (3, [0, 1, 3])):
        layer = CachedAttention(KeyDiff(tokens=tokens))
        layer(k, k, k)
        layer.kept.sort()
        assert layer.kept.positions.tolist() == [[expected]]


def test_left_padded_equals_alone() -> None:
    k = torch.randn(2, 2, 12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    present = torch.ones(2, 10, dtype=torch.bool)
    present[1, :3] = False
    padded, alone = CachedAttention(KeyDiff(tokens=5)), CachedAttention(KeyDiff(tokens=5))
    padded(*[k[:, :, :10]] * 3, present=present)
    alone(*[k[1:, :, 3:10]] * 3)
    for i in (10, 11):
        out = padded(*[k[:, :, i : i + 1]] * 3)
        torch.testing.assert_close(out[1:], alone(*[k[1:, :, i : i + 1]] * 3), rtol=0, atol=1e-12)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="tokens=0: expected at least 1 token"):
        KeyDiff(tokens=0)
