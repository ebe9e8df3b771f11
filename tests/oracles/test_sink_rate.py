"""Sink rate against loops over layers, heads and columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saccade.mechanisms.probe.sink_rate import SinkRate

LAYERS, BATCH, HEADS, SIZE = 3, 2, 4, 8


def maps():
    scores = 2 * np.random.default_rng(1).normal(size=(LAYERS, BATCH, HEADS, SIZE, SIZE))
    scores[..., 0] += 1.0
    scores = np.where(np.tril(np.ones((SIZE, SIZE), dtype=bool)), scores, -np.inf)
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


def show(probe, attention, cuts=()):
    mask = torch.ones(SIZE, SIZE, dtype=torch.bool).tril()[None, None]
    edges = [0, *cuts, SIZE]
    for layer in range(LAYERS):
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            probe.observe(torch.from_numpy(attention[layer][:, :, start:end]), mask[:, :, start:end], start, layer)


@pytest.mark.parametrize("token", [0, 2, 7])
@pytest.mark.parametrize("epsilon", [0.2, 0.3, 0.5])
@pytest.mark.parametrize("cuts", [(), (3, 4)])
def test_agrees_with_the_definition(token, epsilon, cuts):
    attention, probe = maps(), SinkRate(token, epsilon)
    show(probe, attention, cuts)
    hits = 0
    for layer in range(LAYERS):
        for b in range(BATCH):
            for h in range(HEADS):
                column = [attention[layer, b, h, i, token] for i in range(token, SIZE)]
                importance = sum(column) / (SIZE - token)
                assert float(probe.importance()[layer, b, h, token]) == pytest.approx(importance, abs=1e-12)
                hits += importance > epsilon
    assert probe.result() == pytest.approx(hits / (LAYERS * BATCH * HEADS))
    assert float(probe.rates()[token]) == probe.result()


def test_hand_worked_half_of_the_heads():
    probe = SinkRate()
    sink, spread = torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.tensor([[0.2, 0.8], [0.3, 0.7]])
    probe.observe(torch.stack([sink, spread])[None], torch.ones(1, 1, 2, 2, dtype=torch.bool), 0, 0)
    assert probe.result() == 0.5
    assert probe.rates().tolist() == [0.5, 0.5]


def test_bad_use_is_named():
    with pytest.raises(ValueError, match="token=-1: expected at least 0"):
        SinkRate(token=-1)
    with pytest.raises(ValueError, match=r"epsilon=30: expected a weight in \[0, 1\]"):
        SinkRate(epsilon=30)
    with pytest.raises(ValueError, match=r"layers=\[\]: expected at least one observed layer"):
        SinkRate().result()
    with pytest.raises(ValueError, match="token=8: expected a key below 8"):
        show(SinkRate(token=8), maps())
    probe = SinkRate()
    show(probe, maps())
    with pytest.raises(ValueError, match="first_query=0: expected 8, the next query of layer 0 that sink_rate"):
        show(probe, maps())
