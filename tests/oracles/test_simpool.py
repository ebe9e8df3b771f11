"""SimPool against its equations, image by image and head by head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cross.simpool import SimPool

pytestmark = pytest.mark.quick


def oracle(module: SimPool, x: Tensor) -> Tensor:
    """Tokens `[B, N, C]`."""
    width = x.shape[2] // module.heads
    out = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype)
    for b, tokens in enumerate(x):
        centred = tokens - tokens.mean(1, keepdim=True)
        normed = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-6) * module.norm.weight + module.norm.bias
        query = module.to_q.weight @ tokens.mean(0)
        keys = normed @ module.to_k.weight.T
        if module.to_q.bias is not None:
            query, keys = query + module.to_q.bias, keys + module.to_k.bias
        for h in range(module.heads):
            part = slice(h * width, (h + 1) * width)
            weights = torch.exp(keys[:, part] @ query[part] / math.sqrt(width))
            weights = weights / weights.sum()
            if module.gamma is None:
                out[b, part] = weights @ normed[:, part]
            else:
                positive = normed[:, part] - normed.min() + 1e-6
                out[b, part] = (weights @ positive**module.gamma) ** (1 / module.gamma)
    return out


@pytest.mark.parametrize("gamma", [None, 1.0, 1.25, 2.0])
@pytest.mark.parametrize(
    ("heads", "bias", "shape"), [(1, False, (3, 7, 6)), (2, True, (2, 6, 3, 5)), (3, False, (1, 1, 6))]
)
def test_matches_the_oracle(gamma: float | None, heads: int, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = SimPool(6, heads, gamma, bias=bias).double()
    torch.nn.init.normal_(module.norm.weight)
    torch.nn.init.normal_(module.norm.bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tokens = x if x.ndim == 3 else torch.stack([x[:, :, i, j] for i in range(3) for j in range(5)], 1)
    expected = oracle(module, tokens)
    out = module(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(out)
    wanted = [x, *module.parameters()]
    got = torch.autograd.grad((out * weight).sum(), wanted)
    for gradient, reference in zip(got, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-9)


def test_by_hand() -> None:
    """With keys of zero the weights are equal and gamma = 1: the mean of the normed values, less their minimum."""
    module = SimPool(2, gamma=1.0).double()
    torch.nn.init.zeros_(module.to_k.weight)
    x = torch.tensor([[[-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(module(x), torch.tensor([[0.5, 1.5]], dtype=torch.float64), rtol=0, atol=1e-5)


def test_images_do_not_touch_each_other() -> None:
    torch.manual_seed(1)
    module = SimPool(6).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(module(torch.stack([x[0], 100 * x[1]]))[:1], module(x[:1]), rtol=0, atol=1e-12)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="heads=4: expected a divisor of channels=6"):
        SimPool(6, heads=4)
    with pytest.raises(ValueError, match="gamma=0: expected None or a number above 0"):
        SimPool(6, gamma=0)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 6\): expected \[B, N, C\]"):
        SimPool(6)(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"x.shape=\(2, 3, 5\): expected 6 channels"):
        SimPool(6)(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"x.shape=\(2, 0, 6\): expected at least 1 token"):
        SimPool(6)(torch.zeros(2, 0, 6))
