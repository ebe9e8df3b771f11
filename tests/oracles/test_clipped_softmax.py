"""Clipped softmax against a loop over rows written from equation 4 of the paper."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.scores.clipped_softmax import ClippedSoftmax
from saccade.types import Geometry


def oracle(q, k, v, gamma, zeta, causal, alpha=None, length=None):
    """One query at a time: softmax over what it sees, stretch, clip, sum."""
    batch, heads, queries, dim = q.shape
    keys, groups = k.shape[2], heads // k.shape[1]
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                visible = [j for j in range(keys) if not causal or j <= i + keys - queries]
                if not visible:
                    continue
                exps = [math.exp(float(q[b, h, i] @ k[b, h // groups, j]) / math.sqrt(dim)) for j in visible]
                low = gamma
                if alpha is not None:
                    low = -alpha / (len(visible) if length is None else length)
                for j, value in zip(visible, exps, strict=True):
                    weight = min(max((zeta - low) * value / sum(exps) + low, 0.0), 1.0)
                    out[b, h, i] += weight * v[b, h // groups, j]
    return out


def inputs(queries, keys, heads=2, groups=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return 2 * draw(2, heads, queries, 5), draw(2, groups, keys, 5), draw(2, groups, keys, 3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys", "groups"), [(7, 7, 2), (3, 9, 1), (9, 5, 2)])
@pytest.mark.parametrize("settings", [{"gamma": -0.1, "zeta": 1.1}, {"alpha": 2.0}, {"alpha": 0.5, "length": 12}])
def test_agrees_with_the_equations(causal, queries, keys, groups, settings):
    q, k, v = inputs(queries, keys, groups=groups)
    expected = oracle(
        q, k, v, settings.get("gamma", -0.03), settings.get("zeta", 1.0), causal,
        settings.get("alpha"), settings.get("length"),
    )  # fmt: skip
    actual = ClippedSoftmax(**settings)(q, k, v, geometry=Geometry(causal=causal))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_hand_worked_row():
    """Softmax (0.9, 0.1), gamma -0.2, zeta 1.2: 1.4 * 0.9 - 0.2 = 1.06 -> 1 and 1.4 * 0.1 - 0.2 = -0.06 -> 0."""
    scores = torch.tensor([[[[math.log(9.0), 0.0]]]], dtype=torch.float64)
    weights = ClippedSoftmax(gamma=-0.2, zeta=1.2).normalise(scores, torch.ones(1, 1, 1, 2, dtype=torch.bool))
    assert weights.flatten().tolist() == [1.0, 0.0]


def test_masked_pairs_are_inert_and_empty_rows_are_zero_with_finite_gradients():
    scores = torch.randn(1, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)[None, None]
    other = torch.where(mask, scores, 99.0).requires_grad_()
    scores.requires_grad_()
    score = ClippedSoftmax(gamma=-0.05, zeta=1.05)
    weights = score.normalise(scores, mask)
    torch.testing.assert_close(weights, score.normalise(other, mask), rtol=0, atol=0)
    assert (weights[~mask] == 0).all()
    weights.pow(2).sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert (scores.grad[~mask] == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.1}, r"gamma=0\.1: expected at most 0"),
        ({"zeta": 0.9}, r"zeta=0\.9: expected at least 1"),
        ({"alpha": -1.0}, r"alpha=-1\.0: expected at least 0"),
        ({"alpha": 1.0, "length": 0}, r"length=0: expected at least 1"),
        ({"length": 8}, r"length=8: expected None unless alpha"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ClippedSoftmax(**settings)
