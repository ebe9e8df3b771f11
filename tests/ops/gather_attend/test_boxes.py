"""`gather_attend` over `Boxes`: every implementation, its gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch

from saccade.kernels import cpu
from saccade.ops import gather_attend, recording
from saccade.types import Boxes
from saccade.types.grids import Line

native = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")
IMPLS = [pytest.param("cpu", marks=native), "eager", "reference"]


def plane(height, width, block=8):
    """The 3 x 5 window about each token of a grid."""
    lines = []
    for size, kernel in ((height, 3), (width, 5)):
        start = (torch.arange(size) - kernel // 2).clamp(0, size - kernel)
        lines.append(Line(start, start + kernel - 1, 1, kernel))
    return Boxes.of(lines, block)


def inputs(tokens, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, heads, tokens, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


def exact(q, k, v, mask, sinks):
    """Fp64 out and lse; the sink is one more key without a value."""
    q, k, v = (x.double().repeat_interleave(4 // x.shape[1], 1) for x in (q, k, v))
    scores = (q @ k.mT / 4).masked_fill(~mask, -float("inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(2, 4, q.shape[2], 1)], -1)
    return scores.softmax(-1)[..., : mask.shape[-1]] @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("block", [4, 4096])  # the eager engine takes blocks, lists
def test_equals_the_formula_forward_and_backward(impl, with_sinks, block):
    boxes, sinks = plane(7, 9, block), torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True) if with_sinks else None
    leaves = inputs(63)
    wanted = exact(*leaves, boxes.to_dense(), sinks)
    found = gather_attend(*leaves, boxes, sinks=sinks, return_lse=True, impl=impl)
    weights = [torch.randn_like(x) for x in wanted]
    parameters = leaves if sinks is None else [*leaves, sinks]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
    gradients = []
    for pair in (found, wanted):
        total = sum((x * w).sum() for x, w in zip(pair, weights, strict=True))
        gradients.append(torch.autograd.grad(total, parameters))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@native
def test_the_engine_runs_where_it_can_and_says_why_not():
    boxes = plane(7, 9)
    with recording() as records:
        gather_attend(*inputs(63), boxes)
        gather_attend(*inputs(63, torch.float64), boxes)
        gather_attend(*inputs(63), boxes, softcap=20.0)
    assert [entry.impl for entry in records] == ["cpu", "eager", "eager"]
    assert records[0].density == pytest.approx(15 / 63)
    assert "fp64" in records[1].refused["cpu"]
    assert "softcap" in records[2].refused["cpu"]
    with pytest.raises(ValueError, match="impl='cpu': gather_attend cannot run it here: softcap"):
        gather_attend(*inputs(63), boxes, softcap=20.0, impl="cpu")


@native
def test_half_precision_keeps_its_dtype():
    boxes, leaves = plane(7, 9), inputs(63, torch.bfloat16)
    out = gather_attend(*leaves, boxes)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(leaf.grad.dtype == torch.bfloat16 for leaf in leaves)
    torch.testing.assert_close(out.double(), exact(*leaves, boxes.to_dense(), None)[0], rtol=0.01, atol=0.01)


@native
def test_compiles_whole():
    boxes, leaves = plane(7, 9), inputs(63)
    compiled = torch.compile(lambda q, k, v: gather_attend(q, k, v, boxes), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves), gather_attend(*leaves, boxes))


def test_gradients_in_fp64():
    boxes, leaves = plane(3, 5), [x.detach()[:1, :2, :, :3].requires_grad_() for x in inputs(15, torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: gather_attend(q, k, v, boxes), leaves)


def test_refuses_other_sizes():
    with pytest.raises(ValueError, match="index for 63 queries and 63 keys: expected 62 and 62"):
        gather_attend(*inputs(62), plane(7, 9))
