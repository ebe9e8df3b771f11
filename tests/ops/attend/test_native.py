"""`attend` and `block_attend` on the C++ engine: gradients through the operators, sinks, bias and poison included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.ops import attend, block_attend
from saccade.ops.attend import native
from saccade.types import BlockLayout

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(native.MISSING is not None, reason=f"no C++ engine: {native.MISSING}"),
]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem() -> list[Tensor]:
    return [draw(2, 4, 40, 24, seed=0), draw(2, 2, 50, 24, seed=1), draw(2, 2, 50, 16, seed=2)]


SEGMENTS = {
    "q_segments": torch.arange(40)[None] // 10 - 1,
    "kv_segments": torch.arange(50)[None] // 10 - 1,
}
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
RULES = {
    "causal": {"causal": True},
    "window": {"window": (7, 3)},
    "segments": SEGMENTS,
    "softcap": {"softcap": 1.5, "causal": True},
    "sinks": {"sinks": draw(4, seed=3), "causal": True},
    "bias": {"bias": draw(1, 4, 40, 50, seed=4)},
    "alibi": {"alibi": SLOPES, "causal": True},
    "alibi, bias": {"alibi": SLOPES, "bias": draw(1, 4, 40, 50, seed=4), "window": (30, 9)},
    "all": {"causal": True, "window": (20, 0), "softcap": 2.0, "sinks": draw(4, seed=3), "bias": draw(50, seed=5)},
    "all, alibi": {"alibi": SLOPES, "window": (20, 4), "softcap": 2.0, "sinks": draw(4, seed=3), **SEGMENTS},
}


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_gradients_agree_with_the_reference(rules, with_lse):
    results = []
    for impl, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in problem()]
        learned = {name: x.to(dtype).requires_grad_() for name, x in rules.items() if name in ("sinks", "bias")}
        out, lse = attend(*leaves, **(rules | learned), return_lse=True, impl=impl)
        loss = out.square().sum()
        if with_lse:
            loss = loss + torch.where(lse == -torch.inf, 0.0, lse).sin().sum()
        results.append(torch.autograd.grad(loss, [*leaves, *learned.values()]))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("queries", [1, 5, 15, 16, 40])
@pytest.mark.parametrize("keys", [12, 50])
@pytest.mark.parametrize("window", [None, (9, 3)])
def test_slopes_count_from_the_last_key(queries, keys, window):
    """Few queries go to the kernel for decoding; with more queries than keys the first stand before all keys."""
    q, k, v = problem()
    q, k, v = q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]
    distance = (torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)).double()
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT * 24**-0.5
    scores = scores - SLOPES.double()[:, None, None] * distance.abs()
    seen = torch.ones_like(distance).bool() if window is None else (distance <= 9) & (distance >= -3)
    weights = (scores.exp() * seen) / (scores.exp() * seen).sum(-1, keepdim=True).clamp_min(1e-300)
    found = attend(q, k, v, alibi=SLOPES, window=window, impl="cpu")
    torch.testing.assert_close(found.double(), weights @ v.double().repeat_interleave(2, 1), rtol=1e-5, atol=1e-5)


def test_a_bias_without_gradient_is_differentiated_by_the_engine(monkeypatch):
    """And one with a gradient is not: only the eager backward has it."""
    calls = []
    real = native.backward
    monkeypatch.setattr(native, "backward", lambda *x: calls.append(1) or real(*x))
    for learned, expected in ((False, 1), (True, 1)):
        leaves = [x.requires_grad_() for x in problem()]
        attend(*leaves, bias=draw(50, seed=5).requires_grad_(learned), impl="cpu").sum().backward()
        assert len(calls) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_poison_reaches_no_gradient(value):
    results = []
    for poison in (0.0, value):
        q, k, v = problem()
        k[:, :, 45:], v[:, :, 45:] = poison, poison
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        keep = torch.ones(40, 50, dtype=torch.bool)
        keep[:, 45:], keep[3] = False, False
        ids = {"q_segments": torch.zeros(1, 40).int(), "kv_segments": (torch.arange(50) >= 45).int()[None]}
        dense = attend(q, k, v, **ids, impl="cpu")
        sparse = block_attend(q, k, v, BlockLayout.from_dense(keep, 16), impl="cpu")
        results += [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (dense, sparse)]
    for clean, poisoned in zip(results[:2], results[2:], strict=True):
        for a, b in zip(clean, poisoned, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_gradients_have_the_dtype_and_the_error_of_the_eager_ones(dtype):
    keep = torch.rand(1, 4, 40, 50, generator=torch.Generator().manual_seed(0)) < 0.4
    layout, grads = BlockLayout.from_dense(keep, 16), {}
    for impl, precision in (("cpu", dtype), ("eager", dtype), ("reference", torch.float64)):
        leaves = [x.to(dtype).to(precision).requires_grad_() for x in problem()]
        out = block_attend(*leaves, layout, impl=impl)
        grads[impl] = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for found, same, exact in zip(grads["cpu"], grads["eager"], grads["reference"], strict=True):
        assert found.dtype == dtype
        errors = [float((x.double() - exact).norm()) for x in (found, same)]
        assert errors[0] <= 2 * errors[1]
