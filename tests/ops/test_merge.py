"""`merge`: attention over disjoint sets of keys, joined, is attention over all of them; gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.ops import attend, merge
from saccade.types import AttentionOutput

pytestmark = pytest.mark.quick

INF = float("inf")


def problem() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 4), (2, 2, 9, 4), (2, 2, 9, 3))
    return [torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def parts_of(q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> list[AttentionOutput]:
    spans = zip([0, *cuts], [*cuts, 9], strict=True)
    return [attend(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in spans]


@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 7], [0, 4], [9]], ids=str)
def test_merged_parts_equal_the_whole(cuts):
    leaves = problem()
    merged, whole = merge(parts_of(*leaves, cuts)), attend(*leaves, return_lse=True)
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in whole]
    grads = [
        torch.autograd.grad((result.out * weights[0]).sum() + (result.lse * weights[1]).sum(), leaves)
        for result in (merged, whole)
    ]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_order_does_not_matter():
    parts = parts_of(*problem(), [3, 5])
    torch.testing.assert_close(merge(parts), merge(parts[::-1]), rtol=1e-12, atol=1e-12)


def test_rows_no_part_saw_are_empty_with_zero_gradients():
    out = torch.zeros(1, 1, 2, 3, requires_grad=True)
    lse = torch.tensor([[[-INF, 0.0]]], requires_grad=True)
    merged = merge([(out, lse), (out, lse)])
    assert bool((merged.out[..., 0, :] == 0).all())
    assert float(merged.lse.detach()[0, 0, 0]) == -INF
    grads = torch.autograd.grad(merged.out.sum() + merged.lse[..., 1].sum(), (out, lse))
    assert bool(grads[0].isfinite().all())
    torch.testing.assert_close(grads[1], torch.tensor([[[0.0, 1.0]]]))


def test_known_case():
    first = (torch.ones(1, 1, 1, 1), torch.tensor([[[0.0]]]))
    second = (torch.full((1, 1, 1, 1), 5.0), torch.tensor([[[3.0]]]).log())
    merged = merge([first, second])
    torch.testing.assert_close(merged.out.flatten(), torch.tensor([4.0]))
    torch.testing.assert_close(merged.lse.flatten(), torch.tensor([4.0]).log())


def test_large_scores_do_not_overflow():
    part = (torch.ones(1, 1, 1, 1), torch.tensor([[[1e4]]]))
    torch.testing.assert_close(merge([part, part]).lse, torch.tensor([[[1e4]]]) + torch.tensor(2.0).log())


def test_keeps_the_dtype():
    part = (torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 1))
    merged = merge([part, part])
    assert (merged.out.dtype, merged.lse.dtype) == (torch.bfloat16, torch.float32)


def test_bad_parts_are_refused():
    with pytest.raises(ValueError, match=r"parts=\[\]: expected at least one"):
        merge([])
    with pytest.raises(ValueError, match="one has lse=None, expected results of return_lse=True"):
        merge([AttentionOutput(torch.ones(1, 1, 1, 1), None)])
