"""Ada-KV against sorted lists: the paper's Algorithm 1 with its safeguard, head by head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.adakv import AdaKV
from saccade.mechanisms.cache.attention import CachedAttention

pytestmark = pytest.mark.quick


def pooled_votes(q: Tensor, k: Tensor, window: int, kernel: int) -> list[float]:
    """Of one key/value head with queries `[S, n, D]`: summed over the window, then the maximum of neighbours."""
    n = len(k)
    votes = [0.0] * (n - window)
    for head in q:
        for i in range(n - window, n):
            weights = [math.exp(float(head[i] @ k[j]) / math.sqrt(k.shape[1])) for j in range(i + 1)]
            votes = [vote + weights[j] / sum(weights) for j, vote in enumerate(votes)]
    reach = kernel // 2
    return [max(votes[max(0, j - reach) : j + reach + 1]) for j in range(len(votes))]


def oracle(q: Tensor, k: Tensor, tokens: int, window: int, kernel: int, floor: float) -> list[list[int]]:
    """Kept positions of each key/value head of one sequence."""
    heads, n, share = k.shape[0], k.shape[1], q.shape[0] // k.shape[0]
    mean = tokens - window
    votes = [pooled_votes(q[g * share : (g + 1) * share], k[g], window, kernel) for g in range(heads)]
    everything = sorted(((vote, g, j) for g in range(heads) for j, vote in enumerate(votes[g])), key=lambda x: -x[0])
    marks = [sum(g == head for _, g, _ in everything[: heads * mean]) for head in range(heads)]
    kept = []
    for g in range(heads):
        count = round(marks[g] * (1 - floor) + int(mean * floor))
        ranked = sorted(range(n - window), key=lambda j: -votes[g][j])
        kept.append([*sorted(ranked[:count]), *range(n - window, n)])
    return kept


def inputs(batch: int, heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, 8), (batch, groups, tokens, 8), (batch, groups, tokens, 5))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k * torch.arange(1, groups + 1, dtype=torch.float64)[:, None, None] * 2, v


@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "window", "kernel", "floor"),
    [(3, 3, 9, 3, 1, 0.2), (4, 2, 12, 4, 3, 0.0), (6, 3, 8, 2, 5, 0.5), (4, 4, 10, 1, 3, 1.0), (2, 1, 9, 3, 3, 0.2)],
)
def test_matches_the_oracle(heads: int, groups: int, tokens: int, window: int, kernel: int, floor: float) -> None:
    n, share = 30, heads // groups
    q, k, v = inputs(2, heads, groups, n + 4)
    layer = CachedAttention(AdaKV(tokens=tokens, window=window, kernel=kernel, floor=floor))
    out = torch.cat([layer(*(x[:, :, a:b] for x in (q, k, v))) for a, b in ((0, n), (n, n + 1), (n + 1, n + 4))], 2)
    layer.kept.sort()
    for b in range(2):
        kept = oracle(q[b, :, :n], k[b, :, :n], tokens, window, kernel, floor)
        assert layer.kept.lengths[b].tolist() == [len(places) + 4 for places in kept]
        for g, places in enumerate(kept):
            assert layer.kept.positions[b, g, : len(places) + 4].tolist() == [*places, *range(n, n + 4)]
            for h in range(g * share, (g + 1) * share):
                for i in range(n, n + 4):
                    seen = [*places, *range(n, i + 1)]
                    weights = (k[b, g, seen] @ q[b, h, i] / math.sqrt(8)).softmax(0)
                    torch.testing.assert_close(out[b, h, i], weights @ v[b, g, seen], rtol=0, atol=1e-10)
    if floor == 1.0:
        assert set(layer.kept.lengths.flatten().tolist()) == {tokens + 4}


def test_by_hand_and_memory_follows_the_heads() -> None:
    """Head 0 looks at one token only, head 1 at 200 alike: it gets the marks, head 0 the one that counts."""
    n = 300
    k = torch.zeros(1, 2, n, 2, dtype=torch.float64)
    k[0, 0, 7, 0], k[0, 1, 10:210, 0] = 2000.0, 2000.0
    q = torch.ones(1, 2, n, 2, dtype=torch.float64)
    layer = CachedAttention(AdaKV(tokens=101, window=1, kernel=1, floor=0.0))
    layer(q, k, k)
    layer.kept.sort()
    assert layer.kept.lengths.tolist() == [[2, 200]]
    assert layer.kept.positions[0, 0, :2].tolist() == [7, 299]
    assert layer.kept.positions[0, 1].tolist() == [*range(10, 209), 299]
    page = 64 * (2 + 2 + 1) * 8 + 64 * 4
    assert layer.nbytes == (1 + 4) * page


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="floor=1.5: expected a share, 0 to 1"):
        AdaKV(floor=1.5)
    with pytest.raises(ValueError, match="tokens=32: expected more than window=32"):
        AdaKV(tokens=32)
