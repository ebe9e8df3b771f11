"""PoolFormer's mixer against a loop over cells."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.mixers.poolformer import PoolFormer

pytestmark = pytest.mark.quick


def oracle(x: Tensor, size: int) -> Tensor:
    """Mean over the cells within size // 2 on every axis that exist, minus the cell."""
    grid, reach = x.shape[2:], size // 2
    out = torch.zeros_like(x)
    for cell in itertools.product(*map(range, grid)):
        around = [range(max(0, i - reach), min(side, i + reach + 1)) for i, side in zip(cell, grid, strict=True)]
        near = [x[(..., *other)] for other in itertools.product(*around)]
        out[(..., *cell)] = sum(near) / len(near) - x[(..., *cell)]
    return out


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("grid", [(7,), (5, 4), (1, 3)])
def test_matches_the_oracle(size: int, grid: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2, 3, *grid, generator=generator, dtype=torch.float64, requires_grad=True)
    out, expected = PoolFormer(size)(x), oracle(x, size)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    (reference,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)


def test_by_hand() -> None:
    x = torch.tensor([[[0.0, 3.0, 6.0, 0.0]]])
    torch.testing.assert_close(PoolFormer(3)(x), torch.tensor([[[1.5, 0.0, -3.0, 3.0]]]))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="size=4: expected an odd number of at least 1"):
        PoolFormer(4)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 3\): expected \[B, C, \*grid\]"):
        PoolFormer()(torch.zeros(2, 3))
