"""SnapKV against loops over heads and tokens, from the paper's section 4 and the authors' settings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache import _votes
from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import compose
from saccade.mechanisms.cache.snapkv import SnapKV
from saccade.mechanisms.cache.storage import Storage

pytestmark = pytest.mark.quick


def voted(q: Tensor, k: Tensor, n: int, window: int, kernel: int, pooling: str) -> list[float]:
    """Pooled votes of tokens 0 .. n - window - 1 from one group's queries `[S, n, D]`."""
    votes = [0.0] * (n - window)
    for head in q:
        for i in range(n - window, n):
            weights = [math.exp(float(head[i] @ k[j]) / math.sqrt(k.shape[1])) for j in range(i + 1)]
            for j in range(n - window):
                votes[j] += weights[j] / sum(weights)
    reach = kernel // 2
    around = [votes[max(0, j - reach) : j + reach + 1] for j in range(len(votes))]
    return [max(near) if pooling == "max" else sum(near) / kernel for near in around]


def oracle(q: Tensor, k: Tensor, n: int, tokens: int, window: int, kernel: int, pooling: str) -> list[int]:
    if n <= tokens:
        return list(range(n))
    votes = voted(q, k, n, window, kernel, pooling)
    ranked = sorted(range(n - window), key=lambda j: -votes[j])[: tokens - window]
    return [*sorted(ranked), *range(n - window, n)]


def inputs(batch: int, heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, 8), (batch, groups, tokens, 8), (batch, groups, tokens, 5))
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def feed(layer: CachedAttention, problem: tuple[Tensor, Tensor, Tensor], sizes: list[int]) -> Tensor:
    parts = zip(*(x.split(sizes, 2) for x in problem), strict=True)
    return torch.cat([layer(*part) for part in parts], 2)


def kept(layer: CachedAttention) -> list[list[list[int]]]:
    layer.kept.sort()
    return [[[p for p in head if p >= 0] for head in row] for row in layer.kept.positions.tolist()]


@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "window", "kernel", "pooling"),
    [
        (2, 2, 9, 4, 3, "mean"),
        (4, 2, 7, 2, 5, "max"),
        (6, 1, 8, 1, 1, "mean"),
        (2, 1, 6, 5, 7, "max"),
        (2, 2, 19, 3, 3, "mean"),
        (2, 2, 20, 3, 3, "mean"),
    ],
)
def test_matches_the_oracle(heads: int, groups: int, tokens: int, window: int, kernel: int, pooling: str) -> None:
    n, share = 20, heads // groups
    q, k, v = inputs(2, heads, groups, n + 3)
    layer = CachedAttention(SnapKV(tokens=tokens, window=window, kernel=kernel, pooling=pooling))  # type: ignore[arg-type]
    out = feed(layer, (q, k, v), [n, 1, 2])
    for b in range(2):
        for g in range(groups):
            mine = q[b, g * share : (g + 1) * share]
            places = oracle(mine, k[b, g], n, tokens, window, kernel, pooling)
            for h in range(g * share, (g + 1) * share):
                for i in range(n + 3):
                    seen = list(range(i + 1)) if i < n else [*places, *range(n, i + 1)]
                    weights = (k[b, g, seen] @ q[b, h, i] / math.sqrt(8)).softmax(0)
                    torch.testing.assert_close(out[b, h, i], weights @ v[b, g, seen], rtol=0, atol=1e-10)
            assert kept(layer)[b][g] == [*places, n, n + 1, n + 2]


def test_by_hand() -> None:
    """The last query looks at token 4, whose neighbours come along by pooling; equal votes go to the earlier token."""
    k = torch.zeros(1, 1, 9, 2, dtype=torch.float64)
    k[0, 0, 4, 0] = 2000.0
    ones = torch.ones(1, 1, 9, 2, dtype=torch.float64)
    for kernel, expected in ((1, [0, 1, 4, 8]), (3, [3, 4, 5, 8])):
        layer = CachedAttention(SnapKV(tokens=4, window=1, kernel=kernel))
        layer(ones, k, ones)
        assert kept(layer) == [[expected]]


def test_a_prompt_in_chunks_is_compressed_as_one_fed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = inputs(2, 4, 2, 24)
    whole = CachedAttention(SnapKV(tokens=9, window=4))
    expected = feed(whole, problem, [21, 1, 1, 1])
    for sizes in ([10, 11], [19, 2], [18, 1, 2], [1] * 21):
        monkeypatch.setattr(_votes, "SCORE_ELEMENTS", sum(sizes[:2]) * 30)
        layer = CachedAttention(SnapKV(tokens=9, window=4, prompt=21))
        torch.testing.assert_close(feed(layer, problem, [*sizes, 1, 1, 1]), expected, rtol=0, atol=1e-10)
        assert kept(layer) == kept(whole)


def test_question_aware_and_question_agnostic() -> None:
    """The context's token 2 is asked for by the question alone, token 5 by the context's end."""
    k = torch.zeros(1, 1, 12, 3, dtype=torch.float64)
    k[0, 0, 2, 0], k[0, 0, 5, 1] = 500.0, 500.0
    q = torch.zeros(1, 1, 12, 3, dtype=torch.float64)
    q[0, 0, :10, 1], q[0, 0, 10:, 0] = 1.0, 1.0
    aware = CachedAttention(SnapKV(tokens=3, window=2, kernel=1))
    feed(aware, (q, k, k), [12])
    assert kept(aware) == [[[2, 10, 11]]]
    agnostic = CachedAttention(SnapKV(tokens=3, window=2, kernel=1))
    feed(agnostic, (q, k, k), [10, 2])
    assert kept(agnostic) == [[[5, 8, 9, 10, 11]]]
    one_call = CachedAttention(SnapKV(tokens=3, window=2, kernel=1, prompt=10))
    out = feed(one_call, (q, k, k), [12])
    assert kept(one_call) == kept(agnostic)
    torch.testing.assert_close(out[0, 0, 10:], k[0, 0, [2, 2]])


def test_left_padded_equals_alone() -> None:
    q, k, v = inputs(2, 4, 2, 16)
    present = torch.ones(2, 13, dtype=torch.bool)
    present[1, :5] = False
    policy = SnapKV(tokens=6, window=3, kernel=3)
    padded, alone = CachedAttention(policy), CachedAttention(policy)
    padded(*(x[:, :, :13] for x in (q, k, v)), present=present)
    alone(*(x[1:, :, 5:13] for x in (q, k, v)))
    assert kept(padded)[1] == kept(alone)[0]
    for i in range(13, 16):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        torch.testing.assert_close(padded(*token)[1:], alone(*(x[1:] for x in token)), rtol=0, atol=1e-12)


def test_memory_is_freed_and_a_packed_store_serves() -> None:
    problem = inputs(1, 2, 2, 131)
    layer = CachedAttention(SnapKV(tokens=20, window=4))
    feed(layer, problem, [130, 1])
    assert layer.nbytes == 2 * (64 * (8 + 5 + 1) * 8 + 64 * 4)
    packed = CachedAttention(compose(keep=SnapKV(tokens=20, window=4), store=Storage(bits=8)))
    feed(packed, problem, [130, 1])
    assert packed.kept.lengths.tolist() == [[21, 21]]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="window=0: expected at least 1 token"):
        SnapKV(window=0)
    with pytest.raises(ValueError, match="tokens=32: expected more than window=32"):
        SnapKV(tokens=32)
    with pytest.raises(ValueError, match="kernel=4: expected an odd number, at least 1"):
        SnapKV(kernel=4)
    with pytest.raises(ValueError, match="pooling='sum': expected 'mean' or 'max'"):
        SnapKV(pooling="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt=0: expected at least 1 token, or None"):
        SnapKV(prompt=0)
