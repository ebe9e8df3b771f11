"""PyramidKV's budgets against the paper's arithmetic sequence in plain numbers, its choice against sorted votes."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.pyramidkv import PyramidKV

pytestmark = pytest.mark.quick


def budget(n: int, layer: int, layers: int, tokens: int, window: int, beta: int) -> int:
    """Tokens kept beside the window of a prompt of n; Zefan-Cai/PyramidKV's integers."""
    base = tokens - window
    if n < 2 * base or layers == 1:
        return base
    last = base // beta
    first = 2 * base - last
    if first >= n - window:
        first = n - window
        last = 2 * base - first
    return first - layer * ((first - last) // (layers - 1))


@pytest.mark.parametrize("n", [40, 47, 60, 61, 63, 64, 65, 70, 120, 4000])
@pytest.mark.parametrize(("tokens", "window", "beta"), [(36, 4, 20), (24, 8, 3), (33, 1, 1)])
@pytest.mark.parametrize("layers", [1, 2, 5, 32])
def test_budgets(n: int, tokens: int, window: int, beta: int, layers: int) -> None:
    policy = PyramidKV(tokens=tokens, window=window, beta=beta)
    for layer in range(layers):
        found = policy.budgets(torch.zeros(1, 1, n), torch.tensor([n]), Step(layer=layer, layers=layers))
        assert found.tolist() == [[budget(n, layer, layers, tokens, window, beta)]]


def test_by_hand() -> None:
    """Mean 20, l = 20 // 5 = 4, m = 36, 4 layers: 36, 26, 16, 6 less the rounding: steps of 32 // 3 = 10."""
    policy = PyramidKV(tokens=22, window=2, beta=5)
    budgets = [policy.budgets(torch.zeros(1, 1, 1), torch.tensor([99]), Step(layer=i, layers=4)) for i in range(4)]
    assert [int(x) for x in budgets] == [36, 26, 16, 6]


def test_layers_keep_the_best_of_their_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    n, tokens, window, layers = 50, 14, 3, 4
    q, k, v = (2 * torch.randn(2, 2, n, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    stack = CachedAttention.stack(PyramidKV(tokens=tokens, window=window, kernel=3, beta=4), layers)
    for layer in stack:
        layer(q, k, v)
        layer.kept.sort()
    for b in range(2):
        for g in range(2):
            votes = [0.0] * (n - window)
            for i in range(n - window, n):
                weights = [math.exp(float(q[b, g, i] @ k[b, g, j]) / math.sqrt(8)) for j in range(i + 1)]
                votes = [vote + weights[j] / sum(weights) for j, vote in enumerate(votes)]
            votes = [max(votes[max(0, j - 1) : j + 2]) for j in range(len(votes))]
            ranked = sorted(range(len(votes)), key=lambda j: -votes[j])
            for number, layer in enumerate(stack):
                count = budget(n, number, layers, tokens, window, 4)
                places = layer.kept.positions[b, g, : count + window].tolist()
                assert places == [*sorted(ranked[:count]), *range(n - window, n)]
                assert layer.kept.lengths[b, g] == count + window
    assert [layer.kept.lengths[0, 0].item() for layer in stack] == [23, 17, 11, 5]


def test_a_layer_that_does_not_know_how_many_there_are() -> None:
    x = torch.zeros(1, 1, 20, 4)
    with pytest.raises(ValueError, match=r"step.layers=1: expected more than layer=3 \(see CachedAttention.stack\)"):
        CachedAttention(PyramidKV(tokens=6, window=2), layer=3)(x, x, x)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="beta=0: expected at least 1"):
        PyramidKV(beta=0)
    with pytest.raises(ValueError, match="tokens=8: expected more than window=8"):
        PyramidKV(tokens=8)
