"""Key norms against sorted lists of lengths."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.key_norm import KeyNorm

pytestmark = pytest.mark.quick


def oracle(q: Tensor, k: Tensor, v: Tensor, chunks: list[int], tokens: int) -> tuple[Tensor, list[int]]:
    """One query head and its key/value head: outputs `[N, E]` and the positions that are left."""
    out, cache, start = torch.zeros(len(q), v.shape[1], dtype=q.dtype), [], 0
    for size in chunks:
        cache += range(start, start + size)
        for i in range(start, start + size):
            seen = [j for j in cache if j <= i]
            out[i] = (k[seen] @ q[i] / math.sqrt(len(q[i]))).softmax(0) @ v[seen]
        start += size
        cache = sorted(sorted(cache, key=lambda j: math.sqrt(sum(float(x) ** 2 for x in k[j])))[:tokens])
    return out, cache


@pytest.mark.parametrize(("chunks", "tokens"), [([1] * 15, 5), ([9, 1, 4, 1], 4), ([13, 1, 1], 1), ([7, 8], 14)])
def test_matches_the_oracle(chunks: list[int], tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (2 * torch.randn(2, h, 15, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    layer = CachedAttention(KeyNorm(tokens=tokens, whole_layers=0))
    parts = zip(q.split(chunks, 2), k.split(chunks, 2), v.split(chunks, 2), strict=True)
    out = torch.cat([layer(*part) for part in parts], 2)
    layer.kept.sort()
    for b in range(2):
        for h in range(4):
            expected, kept = oracle(q[b, h], k[b, h // 2], v[b, h // 2], chunks, tokens)
            torch.testing.assert_close(out[b, h], expected, rtol=0, atol=1e-10)
            assert layer.kept.positions[b, h // 2].tolist() == kept


def test_by_hand_and_the_first_layers_stay_whole() -> None:
    """Norms 5, 1, 4, 1, 3: the two shortest, then also the next; of a padded sequence only its own tokens."""
    k = torch.tensor([5.0, -1.0, 4.0, 1.0, -3.0], dtype=torch.float64).view(1, 1, 5, 1).expand(2, 1, 5, 1)
    for tokens, expected in ((1, [1]), (2, [1, 3]), (3, [1, 3, 4])):
        layers = CachedAttention.stack(KeyNorm(tokens=tokens, whole_layers=1), 2)
        for layer in layers:
            layer(k, k, k, present=torch.tensor([[True] * 5, [False] * 3 + [True] * 2]))
            layer.kept.sort()
        assert layers[0].kept.lengths.tolist() == [[5], [2]]
        assert layers[1].kept.positions[0].tolist() == [expected]
        assert layers[1].kept.positions[1, 0, : min(tokens, 2)].tolist() == [0, 1][:tokens]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="tokens=0: expected at least 1 token"):
        KeyNorm(tokens=0)
    with pytest.raises(ValueError, match="whole_layers=-1: expected at least 0 layers"):
        KeyNorm(whole_layers=-1)
