"""Softplus attention (LSSA, LSSAR) against a loop over rows written from the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.scores.softplus import Softplus
from saccade.types import Geometry

pytestmark = pytest.mark.quick


def oracle(q, k, v, power, causal, scale=None):
    """One query at a time, plain floats, no stabilisation."""
    batch, heads, queries, dim = q.shape
    keys, groups = k.shape[2], heads // k.shape[1]
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=q.dtype)
    factor = math.log(dim) if scale is None else scale
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                visible = [j for j in range(keys) if not causal or j <= i + keys - queries]
                count = len(visible)
                if count == 0:
                    continue
                row = []
                for j in visible:
                    query, key = q[b, h, i], k[b, h // groups, j]
                    cosine = float(query @ key) / float(query.norm() * key.norm())
                    row.append(math.log(1 + math.exp(factor * math.log(count) * cosine)))
                row = [a / sum(row) for a in row]
                if power is not None:
                    row = [max(a * count - (1 if count > 3 else 0), 0) ** power for a in row]
                    row = [a / sum(row) for a in row]
                for j, weight in zip(visible, row, strict=True):
                    out[b, h, i] += weight * v[b, h // groups, j]
    return out


def inputs(queries, keys, groups=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2, queries, 5, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, groups, keys, 5, generator=generator, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("power", [None, 1.0, 3.0, 15.0])
@pytest.mark.parametrize(("queries", "keys", "groups"), [(7, 7, 2), (3, 9, 1), (9, 5, 2)])
def test_agrees_with_the_equations(causal, power, queries, keys, groups):
    q, k, v = inputs(queries, keys, groups)
    actual = Softplus(power=power)(q, k, v, geometry=Geometry(causal=causal))
    torch.testing.assert_close(actual, oracle(q, k, v, power, causal), rtol=0, atol=1e-9)


def test_scale_replaces_log_d():
    q, k, v = inputs(4, 6)
    torch.testing.assert_close(
        Softplus(None)(q, k, v, scale=0.7), oracle(q, k, v, None, causal=False, scale=0.7), atol=1e-10, rtol=0
    )


def test_hand_worked_rows():
    """One key: weight 1. Two keys, the second opposite: log 2 scales log D = 1 so the sizes are log(3) and log(1.5)."""
    mask = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    scores = torch.tensor([[[[1.0, -1.0]]]], dtype=torch.float64)
    plain = Softplus(None).normalise(scores, mask).flatten()
    assert plain[0].item() == pytest.approx(math.log(3) / (math.log(3) + math.log(1.5)))
    squared = Softplus(2.0).normalise(scores, mask).flatten()
    assert squared[0].item() == pytest.approx(math.log(3) ** 2 / (math.log(3) ** 2 + math.log(1.5) ** 2))
    alone = Softplus().normalise(scores, torch.tensor([[[[True, False]]]]))
    assert alone.flatten().tolist() == [1.0, 0.0]


def test_a_flat_row_gives_zero_once_it_is_re_weighted():
    scores = torch.full((1, 1, 1, 8), 0.3)
    assert (Softplus(3.0).normalise(scores, torch.ones(1, 1, 1, 8, dtype=torch.bool)) == 0).all()


def test_a_large_power_of_a_long_row_does_not_overflow():
    scores = torch.zeros(1, 1, 1, 4096)
    scores[..., 0] = 6.0
    weights = Softplus(15.0).normalise(scores, torch.ones(1, 1, 1, 4096, dtype=torch.bool))
    assert weights.flatten()[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("power", [None, 3.0])
def test_masked_pairs_are_inert_and_empty_rows_are_zero_with_finite_gradients(power):
    scores = torch.randn(1, 1, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)[None, None]
    other = torch.where(mask, scores, 99.0)
    scores.requires_grad_()
    weights = Softplus(power).normalise(scores, mask)
    torch.testing.assert_close(weights, Softplus(power).normalise(other, mask), rtol=0, atol=0)
    assert (weights[~mask] == 0).all()
    weights.pow(2).sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert (scores.grad[~mask] == 0).all()


def test_poisoned_padding_reaches_no_gradient():
    q, k, v = inputs(4, 6)
    k[:, :, :2] = torch.nan
    v[:, :, :2] = torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    segments = torch.tensor([[-1, -1, 0, 0, 0, 0]])
    out = Softplus(3.0)(q, k, v, geometry=Geometry(q_segments=segments[:, 2:], kv_segments=segments))
    with torch.no_grad():
        expected = oracle(q.detach(), k.detach()[:, :, 2:], v.detach()[:, :, 2:], 3.0, causal=False)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    grads = torch.autograd.grad(out.pow(2).sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("power", [0.5, 0.0])
def test_bad_power_is_named(power):
    with pytest.raises(ValueError, match=rf"power={power}: expected at least 1"):
        Softplus(power)
