"""Grouped-query attention against loops over heads, and the projection conversion against projecting first."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.heads.gqa import GQA

pytestmark = pytest.mark.quick


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("heads", "groups"), [(6, 1), (6, 2), (6, 3), (6, 6), (4, 2)])
def test_share_is_the_mean_of_neighbouring_heads(heads, groups):
    k, v = draw(2, heads, 5, 3), draw(2, heads, 5, 7, seed=1)
    shared_k, shared_v = GQA(groups).share(k, v)
    size = heads // groups
    for g in range(groups):
        mean_k = sum(k[:, h] for h in range(g * size, (g + 1) * size)) / size
        mean_v = sum(v[:, h] for h in range(g * size, (g + 1) * size)) / size
        torch.testing.assert_close(shared_k[:, g], mean_k, rtol=0, atol=1e-12)
        torch.testing.assert_close(shared_v[:, g], mean_v, rtol=0, atol=1e-12)


def test_hand_worked_means():
    k = torch.tensor([1.0, 3.0, 10.0, 20.0]).reshape(1, 4, 1, 1)
    shared_k, shared_v = GQA(2).share(k, -k)
    assert shared_k.flatten().tolist() == [2.0, 15.0]
    assert shared_v.flatten().tolist() == [-2.0, -15.0]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_pooled_projection_gives_the_pooled_keys(groups):
    heads, dim, channels = 4, 3, 5
    weight, bias, x = draw(heads * dim, channels), draw(heads * dim, seed=1), draw(2, 7, channels, seed=2)
    keys = (x @ weight.T + bias).reshape(2, 7, heads, dim).transpose(1, 2)
    expected, _ = GQA(groups).share(keys, keys)
    pooled = x @ GQA(groups).pool_projection(weight, heads).T + GQA(groups).pool_projection(bias, heads)
    torch.testing.assert_close(pooled.reshape(2, 7, groups, dim).transpose(1, 2), expected, rtol=0, atol=1e-12)


def test_gradients():
    k, v = draw(1, 4, 3, 2).requires_grad_(), draw(1, 4, 3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(GQA(2).share, (k, v))


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="groups=0: expected at least 1"):
        GQA(0)
    with pytest.raises(ValueError, match="groups=3: expected a divisor of the 4 heads"):
        GQA(3).share(draw(1, 4, 2, 2), draw(1, 4, 2, 2))
    with pytest.raises(ValueError, match="v heads=2: expected 4, as k"):
        GQA(2).share(draw(1, 4, 2, 2), draw(1, 2, 2, 2))
    with pytest.raises(ValueError, match="groups=3: expected a divisor of the 4 heads"):
        GQA(3).pool_projection(draw(8, 2), 4)
    with pytest.raises(ValueError, match="weight rows=9: expected a multiple of 4 heads"):
        GQA(2).pool_projection(draw(9, 2), 4)
