"""iLLaMA's soft mask against the masked softmax, and its schedule against a table."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.soft_mask import SoftMask, soft_mask_schedule


@pytest.mark.parametrize("softness", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 19])
def test_output_and_gradients_are_those_of_the_masked_softmax(softness: float, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, 4, tokens, 6), (2, 2, tokens, 6), (2, 2, tokens, 5))
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    q, k, v = leaves
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    mask = torch.tensor(
        [[1.0 if j <= i else softness for j in range(tokens)] for i in range(tokens)], dtype=torch.float64
    )
    wanted = ((q @ keys.mT / 6**0.5).softmax(-1) * mask) @ values
    out = SoftMask(softness)(q, k, v)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    for got, gradient in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-10)


def test_known_by_hand() -> None:
    """Equal scores of 4 tokens, values 4: token i keeps i + 1 of 4 whole and the rest at a quarter."""
    zeros = torch.zeros(1, 1, 4, 2)
    out = SoftMask(0.25)(zeros, zeros, torch.full((1, 1, 4, 1), 4.0))
    torch.testing.assert_close(out.flatten(), torch.tensor([1.75, 2.5, 3.25, 4.0]))


def test_schedules() -> None:
    assert [soft_mask_schedule(step, 5) for step in range(7)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert [soft_mask_schedule(step, 2, "constant", 0.5) for step in range(4)] == [0.5, 0.5, 0.0, 0.0]
    assert soft_mask_schedule(0, 1) == 1.0


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"softness=1\.5: expected in \[0, 1\]"):
        SoftMask(1.5)
    for arguments, message in (
        ((-1, 5), "step=-1: expected at least 0"),
        ((0, 0), "steps=0: expected at least 1"),
        ((0, 5, "cosine"), "form='cosine': expected 'linear' or 'constant'"),
        ((0, 5, "linear", 2.0), r"softness=2\.0: expected in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_mask_schedule(*arguments)
