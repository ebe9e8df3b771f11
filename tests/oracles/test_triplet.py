"""Triplet attention by rotating the whole tensor, with the convolution written as loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade.mechanisms.gates.triplet import Triplet

pytestmark = pytest.mark.quick


def gate(branch: nn.Sequential, x: Tensor) -> Tensor:
    """x * sigmoid(BN(conv([max, mean] over axis 1))) for x `[B, P, Q, R]`, in evaluation mode."""
    weight, norm = branch[0].weight[0], branch[1]
    reach = weight.shape[1] // 2
    pooled = torch.stack([x.max(1).values, x.sum(1) / x.shape[1]], 1)
    scores = torch.zeros(x.shape[0], *x.shape[2:], dtype=x.dtype)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            for di in range(-reach, reach + 1):
                for dj in range(-reach, reach + 1):
                    if 0 <= i + di < x.shape[2] and 0 <= j + dj < x.shape[3]:
                        scores[:, i, j] += pooled[:, :, i + di, j + dj] @ weight[:, di + reach, dj + reach]
    scores = (scores - norm.running_mean) / torch.sqrt(norm.running_var + 1e-5) * norm.weight + norm.bias
    return x / (1 + torch.exp(-scores))[:, None]


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize(("kernel", "shape"), [(7, (2, 3, 5, 4)), (3, (1, 6, 2, 3)), (1, (2, 1, 3, 1))])
def test_matches_the_oracle(spatial: bool, kernel: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = Triplet(kernel, spatial=spatial).double().eval()
    branches = [module.height, module.width] + ([module.spatial] if spatial else [])
    for branch in branches:
        for name in ("running_mean", "weight", "bias"):
            nn.init.normal_(getattr(branch[1], name))
        nn.init.uniform_(branch[1].running_var, 0.5, 2.0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    turned_height = gate(module.height, x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
    turned_width = gate(module.width, x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
    total = turned_height + turned_width
    expected = (total + gate(module.spatial, x)) / 3 if spatial else total / 2
    out = module(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(out)
    wanted = [x, *module.parameters()]
    got = torch.autograd.grad((out * weight).sum(), wanted)
    for gradient, reference in zip(got, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-9)


def test_by_hand() -> None:
    """With convolutions of zero every gate is sigmoid(0) = 1 / 2."""
    module = Triplet().eval()
    for branch in (module.height, module.width, module.spatial):
        nn.init.zeros_(branch[0].weight)
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), x / 2)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="kernel=2: expected an odd number of at least 1"):
        Triplet(2)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 3, 4\): expected \[B, C, height, width\]"):
        Triplet()(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"x.shape=\(2, 0, 4, 4\): expected .* not empty"):
        Triplet()(torch.zeros(2, 0, 4, 4))
