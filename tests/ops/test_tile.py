"""`tile_forward` and `tile_backward` against dense attention and autograd."""

from __future__ import annotations

import pytest
import torch

from saccade.ops.tile import tile_backward, tile_forward

pytestmark = pytest.mark.quick


def dense(q, k, v, mask, scale, softcap):
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.exp(scores) * mask
    total = weights.sum(-1)
    safe = torch.where(total > 0, total, 1.0)
    return weights @ v / safe[..., None], torch.where(total > 0, safe.log(), -torch.inf)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask_shape", [None, (6, 8, 7), (1, 8, 7), (6, 1, 7), (3, 4, 7)])
@pytest.mark.parametrize("with_grad_lse", [False, True])
def test_agrees_with_dense(softcap, mask_shape, with_grad_lse):
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 4), (7, 4), (7, 5))
    q, k, v = (torch.randn(6, *s, generator=generator, dtype=torch.float64, requires_grad=True) for s in sizes)
    mask, spread = None, torch.ones(6, 8, 7, dtype=torch.bool)
    if mask_shape is not None:
        mask = torch.rand(mask_shape, generator=generator) < 0.5
        mask[0, 0] = False
        tiles, rows, _ = mask_shape
        spread = mask[:, None, None].expand(-1, 6 // tiles, 8 // rows, -1, -1).reshape(6, 8, 7)
    out, lse = dense(q, k, v, spread, 0.3, softcap)
    inputs = [x.detach() for x in (q, k, v)]
    found = tile_forward(*inputs, mask, 0.3, softcap)
    torch.testing.assert_close(found, (out.detach(), lse.detach()))
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grad_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64) if with_grad_lse else None
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + (torch.where(lse == -torch.inf, 0.0, lse) * grad_lse).sum()
    gradients = tile_backward(grad_out, grad_lse, *inputs, mask, *found, 0.3, softcap)
    torch.testing.assert_close(gradients, torch.autograd.grad(loss, (q, k, v)))


def test_low_precision_accumulates_in_fp32():
    q, k, v = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    out, lse = tile_forward(q, k, v, None, 0.5, None)
    expected = dense(q.double(), k.double(), v.double(), torch.ones(2, 3, 3), 0.5, None)
    torch.testing.assert_close((out, lse), tuple(x.float() for x in expected))


def test_no_keys():
    q, empty = torch.ones(2, 3, 4), torch.ones(2, 0, 4)
    out, lse = tile_forward(q, empty, empty, None, 1.0, None)
    torch.testing.assert_close(out, torch.zeros(2, 3, 4))
    torch.testing.assert_close(lse, torch.full((2, 3), -torch.inf))
    dq, dk, dv = tile_backward(out, None, q, empty, empty, None, out, lse, 1.0, None)
    torch.testing.assert_close(dq, torch.zeros(2, 3, 4))
    assert dk.shape == dv.shape == (2, 0, 4)
