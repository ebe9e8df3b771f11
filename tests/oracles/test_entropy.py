"""Attention entropy against loops over rows."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.probe.entropy import Entropy

LAYERS, BATCH, HEADS, SIZE = 2, 2, 3, 6


def maps():
    scores = torch.randn(
        LAYERS, BATCH, HEADS, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    mask = torch.ones(SIZE, SIZE, dtype=torch.bool).tril(-1)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0)
    return weights, mask[None, None]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_agrees_with_the_definition(relative, step):
    """Row i sees i keys, row 0 none."""
    (weights, mask), probe = maps(), Entropy(relative)
    for start in range(0, SIZE, step):
        for layer in range(LAYERS):
            rows = slice(start, start + step)
            probe.observe(weights[layer][:, :, rows], mask[:, :, rows], start, layer)
    for layer in range(LAYERS):
        for h in range(HEADS):
            values = []
            for b in range(BATCH):
                for i in range(2 if relative else 1, SIZE):
                    row = [float(p) for p in weights[layer, b, h, i, :i]]
                    value = -sum(p * math.log(p) for p in row)
                    values.append(value / math.log(i) if relative else value)
            assert float(probe.result()[layer, h]) == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_hand_worked_uniform_and_certain_rows():
    probe = Entropy()
    weights = torch.tensor([[[[0.25] * 4], [[1.0, 0.0, 0.0, 0.0]]]])
    probe.observe(weights, torch.ones(1, 1, 1, 4, dtype=torch.bool), 0, 0)
    torch.testing.assert_close(probe.result(), torch.tensor([[math.log(4), 0.0]], dtype=torch.float64))
    relative = Entropy(relative=True)
    relative.observe(weights, torch.ones(1, 1, 1, 4, dtype=torch.bool), 0, 0)
    torch.testing.assert_close(relative.result(), torch.tensor([[1.0, 0.0]], dtype=torch.float64))


def test_nothing_observed_is_named():
    with pytest.raises(ValueError, match=r"layers=\[\]: expected at least one observed layer"):
        Entropy().result()
