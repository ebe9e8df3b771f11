"""Expected attention against loops: unrotated queries, their mean and covariance, an explicit mean rotation matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import compose
from saccade.mechanisms.cache.expected_attention import ExpectedAttention
from saccade.mechanisms.cache.storage import Storage

pytestmark = pytest.mark.quick

F64 = torch.float64


def rotation(position: int, frequencies: list[float], dim: int) -> Tensor:
    matrix, pairs = torch.eye(dim, dtype=F64), len(frequencies)
    for i, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        matrix[i, i], matrix[i, i + pairs], matrix[i + pairs, i], matrix[i + pairs, i + pairs] = cos, -sin, sin, cos
    return matrix


def expected(q: Tensor, k: Tensor, start: int, n: int, frequencies: list[float], policy: ExpectedAttention) -> Tensor:
    """Softmax of one head over tokens sinks .. n - 1, from its rotated queries `[N, D]`, those from `start` on."""
    dim = k.shape[1]
    turned = [rotation(t, frequencies, dim).T @ q[t] for t in range(max(start, policy.sinks), n)]
    mean = sum(turned) / len(turned)
    covariance = sum(torch.outer(x - mean, x - mean) for x in turned) / len(turned)
    turn = sum(rotation(n + f, frequencies, dim) for f in range(policy.future)) / policy.future
    mean, covariance = turn @ mean, turn @ covariance @ turn.T
    scores = []
    for j in range(policy.sinks, n):
        score = float(mean @ k[j]) / math.sqrt(dim)
        scores.append(score + (float(k[j] @ covariance @ k[j]) / dim / 2 if policy.covariance else 0.0))
    return torch.tensor(scores, dtype=F64).softmax(0)


def oracle(
    q: Tensor, k: Tensor, v: Tensor, start: int, n: int, frequencies: list[float], policy: ExpectedAttention
) -> list[int]:
    """Kept positions of one group, queries `[S, N, D]`."""
    worth = sum(expected(head, k, start, n, frequencies, policy) for head in q) / len(q)
    if policy.value_norms:
        worth = [(float(w) + policy.epsilon) * float(x.norm()) for w, x in zip(worth, v[policy.sinks : n], strict=True)]
    ranked = sorted(range(policy.sinks, n), key=lambda j: -float(worth[j - policy.sinks]))
    return [*range(policy.sinks), *sorted(ranked[: policy.tokens - policy.sinks])]


def inputs(batch: int, heads: int, groups: int, tokens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, tokens, 8), (batch, groups, tokens, 8), (batch, groups, tokens, 5))
    return [1.5 * torch.randn(shape, generator=generator, dtype=F64) + 0.3 for shape in shapes]


def feed(layer: CachedAttention, problem: list[Tensor], sizes: list[int]) -> Tensor:
    parts = zip(*(x.split(sizes, 2) for x in problem), strict=True)
    return torch.cat([layer(*part) for part in parts], 2)


def kept(layer: CachedAttention) -> list[list[list[int]]]:
    layer.kept.sort()
    return [[[p for p in head if p >= 0] for head in row] for row in layer.kept.positions.tolist()]


BASE = [10000.0 ** -(2 * i / 8) for i in range(4)]


@pytest.mark.parametrize(
    ("policy", "frequencies"),
    [
        (ExpectedAttention(tokens=9), BASE),
        (ExpectedAttention(tokens=7, sinks=0, future=3, epsilon=0.02), BASE),
        (ExpectedAttention(tokens=6, sinks=2, future=50, rope=100.0), [100.0 ** -(2 * i / 8) for i in range(4)]),
        (ExpectedAttention(tokens=8, sinks=1, future=5, rope=(1.0, 0.3)), [1.0, 0.3]),
        (ExpectedAttention(tokens=8, rope=None, covariance=False), []),
        (ExpectedAttention(tokens=8, value_norms=False, future=1), BASE),
    ],
)
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2)])
def test_matches_the_oracle(policy: ExpectedAttention, frequencies: list[float], heads: int, groups: int) -> None:
    n, share = 20, heads // groups
    q, k, v = inputs(2, heads, groups, n + 3)
    layer = CachedAttention(policy)
    out = feed(layer, [q, k, v], [n, 1, 2])
    for b in range(2):
        for g in range(groups):
            mine = q[b, g * share : (g + 1) * share]
            places = oracle(mine, k[b, g], v[b, g], 0, n, frequencies, policy)
            assert kept(layer)[b][g] == [*places, n, n + 1, n + 2]
            for h in range(g * share, (g + 1) * share):
                for i in range(n + 3):
                    seen = list(range(i + 1)) if i < n else [*places, *range(n, i + 1)]
                    weights = (k[b, g, seen] @ q[b, h, i] / math.sqrt(8)).softmax(0)
                    torch.testing.assert_close(out[b, h, i], weights @ v[b, g, seen], rtol=0, atol=1e-10)


def test_chunks_are_judged_by_the_last_and_a_question_stays() -> None:
    policy = ExpectedAttention(tokens=7, sinks=2, future=9, prompt=18)
    q, k, v = inputs(1, 4, 2, 21)
    for sizes, start in (([18, 3], 0), ([21], 0), ([10, 8, 3], 10), ([10, 11], 10), ([1] * 21, 17)):
        layer = CachedAttention(policy)
        feed(layer, [q, k, v], sizes)
        for g in range(2):
            places = oracle(q[0, 2 * g : 2 * g + 2], k[0, g], v[0, g], start, 18, BASE, policy)
            assert kept(layer)[0][g] == [*places, 18, 19, 20]


def test_by_hand() -> None:
    """Queries point east but are turned by a quarter a position; keys that lie where they will point stay."""
    n, quarter = 8, math.pi / 2
    turn = torch.tensor([[math.cos(quarter * t), math.sin(quarter * t)] for t in range(n)], dtype=F64)
    k = torch.zeros(n, 2, dtype=F64)
    k[3], k[5] = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 9.0])  # position 8 looks east, position 9 north
    ones = torch.ones(1, 1, n, 2, dtype=F64)
    for prompt, expected_place in ((8, 3), (7, 0)):  # 7 looks south, to neither: all others tie
        layer = CachedAttention(ExpectedAttention(tokens=1, sinks=0, future=1, rope=(quarter,), prompt=prompt))
        layer(turn[None, None], k[None, None], ones)
        assert kept(layer)[0][0][0] == expected_place
    still = CachedAttention(ExpectedAttention(tokens=1, sinks=0, future=4, rope=(quarter,), covariance=False))
    loud = ones.clone()
    loud[..., 6, :] = 2.0
    still(turn[None, None], k[None, None], loud)  # a full turn averages to nothing: the value's length decides
    assert kept(still) == [[[6]]]


def test_variance_counts() -> None:
    """Queries of mean 0 that vary along the first channel alone expect more of a key along it."""
    q = torch.zeros(1, 1, 8, 2, dtype=F64)
    q[0, 0, ::2, 0], q[0, 0, 1::2, 0] = 3.0, -3.0
    k = torch.zeros(1, 1, 8, 2, dtype=F64)
    k[0, 0, 2, 1], k[0, 0, 5, 0] = 4.0, -1.0
    for covariance, place in ((True, 5), (False, 0)):
        layer = CachedAttention(ExpectedAttention(tokens=1, sinks=0, rope=None, covariance=covariance))
        layer(q, k, torch.ones_like(k))
        assert kept(layer) == [[[place]]]


def test_left_padded_equals_alone() -> None:
    problem = inputs(2, 4, 2, 16, seed=3)
    present = torch.ones(2, 13, dtype=torch.bool)
    present[1, :4] = False
    policy = ExpectedAttention(tokens=6, sinks=2)
    padded, alone = CachedAttention(policy), CachedAttention(policy)
    padded(*(x[:, :, :13] for x in problem), present=present)
    alone(*(x[1:, :, 4:13] for x in problem))
    assert kept(padded)[1] == kept(alone)[0]
    for i in range(13, 16):
        token = [x[:, :, i : i + 1] for x in problem]
        torch.testing.assert_close(padded(*token)[1:], alone(*(x[1:] for x in token)), rtol=0, atol=1e-12)


def test_a_short_prompt_stays_beside_a_long_one_and_a_packed_store_serves() -> None:
    present = torch.ones(2, 12, dtype=torch.bool)
    present[1, :7] = False
    layer = CachedAttention(ExpectedAttention(tokens=6))
    layer(*inputs(2, 2, 2, 12), present=present)
    assert layer.kept.lengths.tolist() == [[6, 6], [5, 5]]
    packed = CachedAttention(compose(keep=ExpectedAttention(tokens=6), store=Storage(bits=8)))
    feed(packed, inputs(1, 2, 2, 31), [30, 1])
    assert packed.kept.lengths.tolist() == [[7, 7]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sinks": -1}, "sinks=-1: expected at least 0 tokens"),
        ({"tokens": 4}, "tokens=4: expected more than sinks=4"),
        ({"future": 0}, "future=0: expected at least 1 position"),
        ({"rope": 0.0}, r"rope=0\.0: expected a base above 0, finite frequencies, or None"),
        ({"rope": (1.0, math.inf)}, r"rope=\(1\.0, inf\): expected a base above 0, finite frequencies, or None"),
        ({"epsilon": -0.1}, r"epsilon=-0\.1: expected at least 0, finite"),
        ({"prompt": 0}, "prompt=0: expected at least 1 token, or None"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpectedAttention(**settings)  # type: ignore[arg-type]


def test_more_frequencies_than_pairs_of_channels() -> None:
    layer = CachedAttention(ExpectedAttention(tokens=6, rope=(1.0,) * 5))
    with pytest.raises(ValueError, match=r"rope=\(1\.0, .*: expected at most 4 frequencies, half of the channels"):
        layer(*inputs(1, 2, 2, 12))
