"""MTraining's pattern against its rule, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where.mtraining_pattern import MTrainingPattern
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def best(sums: list[float], count: int) -> list[int]:
    return sorted(range(len(sums)), key=lambda place: -sums[place])[:count]


def heaviest(sums: list[float], share: float, most: int) -> list[int]:
    kept, total = [], 0.0
    for place in best(sums, len(sums)):
        total += sums[place]
        if total < share and len(kept) < most:
            kept.append(place)
    return kept


def lines(q: Tensor, k: Tensor, m: MTrainingPattern) -> tuple[list[int], list[int]]:
    """Keys and distances that are kept, for one head."""
    tokens = len(k)
    vertical, slash = [0.0] * tokens, [0.0] * tokens
    asked = range(max(tokens - m.last_queries, 0), tokens)
    for i in asked:
        scores = [float(q[i] @ k[j]) / math.sqrt(q.shape[1]) for j in range(i + 1)]
        if m.mass is not None:
            total = sum(math.exp(score) for score in scores)
            scores = [math.exp(score) / total / len(asked) for score in scores]
        for j in range(tokens):
            if j <= i:
                vertical[j] += scores[j]
                slash[i - j] += scores[j]
            elif m.mass is None:
                vertical[j] = -math.inf
    if m.mass is not None:
        return heaviest(vertical, m.mass[0], m.vertical), heaviest(slash, m.mass[1], m.slash)
    vertical = [math.inf] * min(m.sinks, tokens) + vertical[m.sinks :]
    slash = [math.inf] * min(m.local, tokens) + slash[m.local :]
    return best(vertical, max(m.vertical, m.sinks)), best(slash, max(m.slash, m.local))


def pattern(q: Tensor, k: Tensor, m: MTrainingPattern) -> Tensor:
    """Bool `[N, N]` for one head."""
    tokens = len(k)
    columns, distances = lines(q, k, m)
    crossed = {gap for s in distances for gap in (math.floor(s / m.block), math.ceil(s / m.block))}
    if m.mass is not None:
        crossed.add(0)
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(i + 1):
            mask[i, j] = j in columns or i // m.block - j // m.block in crossed
    return mask


def inputs(tokens: int, heads: int = 4, groups: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, n, tokens, 8) for n in (heads, groups, groups))
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("tokens", [1, 20, 45, 64])
@pytest.mark.parametrize(
    "settings",
    [
        {"vertical": 6, "slash": 3, "last_queries": 8, "sinks": 2, "local": 2, "block": 8},
        {"vertical": 0, "slash": 5, "last_queries": 64, "sinks": 0, "local": 0, "block": 7},
        {"vertical": 3, "slash": 2, "last_queries": 4, "sinks": 4, "local": 1, "block": 16},
        {"vertical": 12, "slash": 12, "mass": (0.4, 0.3), "last_queries": 6, "block": 8},
        {"vertical": 2, "slash": 1, "mass": (1.0, 0.9), "last_queries": 6, "block": 5},
    ],
    ids=str,
)
def test_pattern_and_output(settings: dict, tokens: int) -> None:
    q, k, v = inputs(tokens)
    mechanism = MTrainingPattern(**settings)
    mask = torch.stack([torch.stack([pattern(q[b, h], k[b, h // 2], mechanism) for h in range(4)]) for b in (0, 1)])
    chosen = mechanism.pattern(q, k, CAUSAL)
    chosen.validate()
    assert torch.equal(chosen.to_dense(), mask)
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    wanted = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num() @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(mechanism(q, k, v, geometry=CAUSAL), wanted, rtol=0, atol=1e-10)


def test_known_by_hand() -> None:
    """The last query likes key 1 and the key three before it; blocks of two, so that the diagonal crosses two."""
    q, k = torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 8, 2)
    q[0, 0, 7] = 1.0
    k[0, 0, 1, 0], k[0, 0, 4, 1] = 9.0, 8.0
    m = MTrainingPattern(vertical=1, slash=2, last_queries=1, sinks=0, local=1, block=2)
    columns, distances = m._lines(q, k)
    assert columns[0, 0].nonzero().flatten().tolist() == [1]
    assert distances[0, 0].nonzero().flatten().tolist() == [0, 6]
    m = MTrainingPattern(vertical=1, slash=3, last_queries=1, sinks=0, local=1, block=2)
    assert m.pattern(q, k, CAUSAL).to_dense()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vertical", -1),
        ("slash", 0),
        ("mass", (0.0, 0.5)),
        ("last_queries", 0),
        ("sinks", -1),
        ("local", -1),
        ("block", 0),
    ],
)
def test_bad_setting(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*: expected"):
        MTrainingPattern(**{name: value})


def test_no_tokens() -> None:
    q, k, v = inputs(0)
    assert MTrainingPattern()(q, k, v, geometry=CAUSAL).shape == q.shape
