"""Cog attention against a loop over rows written from equations 4 to 6 of the paper."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.scores.cog import Cog
from saccade.types import Geometry


def oracle(q, k, v, causal):
    """One query at a time: sign(s) exp(|s|) over the sum of its sizes."""
    batch, heads, queries, dim = q.shape
    keys, groups = k.shape[2], heads // k.shape[1]
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                visible = [j for j in range(keys) if not causal or j <= i + keys - queries]
                scores = [float(q[b, h, i] @ k[b, h // groups, j]) / math.sqrt(dim) for j in visible]
                signed = [math.copysign(math.exp(abs(s)), s) for s in scores]
                for j, weight in zip(visible, signed, strict=True):
                    out[b, h, i] += weight / sum(map(abs, signed)) * v[b, h // groups, j]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys", "groups"), [(7, 7, 2), (3, 9, 1), (9, 5, 2)])
def test_agrees_with_the_equations(causal, queries, keys, groups):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, queries, 5, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, groups, keys, 5, generator=generator, dtype=torch.float64)
    actual = Cog()(q, k, v, geometry=Geometry(causal=causal))
    torch.testing.assert_close(actual, oracle(q, k, v, causal), rtol=0, atol=1e-10)


def test_hand_worked_row():
    """Scores log 3 and -log 2 have signed sizes 3 and -2 of 5."""
    scores = torch.tensor([[[[math.log(3.0), -math.log(2.0)]]]], dtype=torch.float64)
    weights = Cog().normalise(scores, torch.ones(1, 1, 1, 2, dtype=torch.bool))
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.6, -0.4], dtype=torch.float64))


def test_large_scores_do_not_overflow():
    scores = torch.tensor([[[[800.0, -800.0, 1.0]]]])
    weights = Cog().normalise(scores, torch.ones(1, 1, 1, 3, dtype=torch.bool))
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.5, -0.5, 0.0]))


def test_masked_pairs_are_inert_and_empty_rows_are_zero_with_finite_gradients():
    scores = torch.randn(1, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)[None, None]
    other = torch.where(mask, scores, -99.0)
    scores.requires_grad_()
    weights = Cog().normalise(scores, mask)
    torch.testing.assert_close(weights, Cog().normalise(other, mask), rtol=0, atol=0)
    assert (weights[~mask] == 0).all()
    weights.pow(2).sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert (scores.grad[~mask] == 0).all()
