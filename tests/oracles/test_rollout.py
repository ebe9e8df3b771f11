"""Attention rollout against numpy matrix products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saccade.mechanisms.probe.rollout import Rollout

pytestmark = pytest.mark.quick


def maps(layers, batch, heads, size):
    scores = np.random.default_rng(0).normal(size=(layers, batch, heads, size, size))
    scores = np.where(np.tril(np.ones((size, size), dtype=bool)), scores, -np.inf)
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


def show(probe, attention, layer, cuts=()):
    """One layer's maps `[B, H, N, N]`, cut into chunks of queries."""
    edges = [0, *cuts, attention.shape[2]]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        chunk = torch.from_numpy(attention[:, :, start:end])
        probe.observe(chunk, chunk > 0, start, layer)


@pytest.mark.parametrize("residual", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("cuts", [(), (1, 4)])
def test_agrees_with_the_product(residual, cuts):
    attention, probe = maps(3, 2, 4, 7), Rollout(residual)
    for layer in (2, 0, 1):
        show(probe, attention[layer], layer, cuts)
    for b in range(2):
        expected = np.eye(7)
        for layer in range(3):
            expected = (residual * np.eye(7) + (1 - residual) * attention[layer, b].mean(0)) @ expected
        np.testing.assert_allclose(probe.result()[b].numpy(), expected, rtol=0, atol=1e-12)


def test_hand_worked_two_layers():
    """Token 1 copies half of token 0 each time: after two layers 1 - (3/4)^2 of it if half of that attention counts."""
    probe, attention = Rollout(), np.array([[[[1.0, 0.0], [0.5, 0.5]]]])
    for layer in range(2):
        show(probe, attention, layer)
    torch.testing.assert_close(probe.result()[0], torch.tensor([[1.0, 0.0], [7 / 16, 9 / 16]], dtype=torch.float64))


@pytest.mark.parametrize("residual", [0.0, 0.5])
def test_a_row_that_sees_nothing_passes_its_token_on(residual):
    probe = Rollout(residual)
    show(probe, np.array([[[[0.0, 0.0], [0.0, 1.0]]]]), 0)
    torch.testing.assert_close(probe.result()[0], torch.eye(2, dtype=torch.float64))


def test_bad_use_is_named():
    with pytest.raises(ValueError, match=r"residual=1\.5: expected a share in \[0, 1\]"):
        Rollout(1.5)
    with pytest.raises(ValueError, match=r"layers=\[\]: expected at least one observed layer"):
        Rollout().result()
    probe, attention = Rollout(), maps(1, 1, 1, 4)[0]
    show(probe, attention, 0)
    with pytest.raises(ValueError, match="first_query=0: expected 4, the next query of layer 0"):
        show(probe, attention, 0)
    show(probe, maps(1, 1, 1, 3)[0], 1)
    with pytest.raises(ValueError, match=r"layer 1: map of shape \(1, 3, 3\), expected \(1, 4, 4\)"):
        probe.result()
