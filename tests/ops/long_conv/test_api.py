"""long_conv: equals the direct sum, for outputs and gradients; its other promises; its refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saccade.ops.dispatch import recording
from saccade.ops.long_conv import long_conv
from saccade.ops.long_conv.eager import fast_length, fft_conv

SHAPES = [
    ((2, 3, 11), (3, 5), True),
    ((2, 3, 11), (3, 30), True),
    ((2, 3, 1), (3, 1), True),
    ((2, 3, 11), (3, 4), False),
    ((2, 3, 4), (3, 9), False),
    ((2, 3, 7, 5), (3, 3, 4), False),
    ((2, 3, 4, 5), (3, 9, 11), False),
    ((1, 3, 1, 1), (3, 1, 1), False),
]


@pytest.mark.parametrize(("size", "taps", "causal"), SHAPES)
def test_equals_the_direct_sum_with_gradients(size: tuple[int, ...], taps: tuple[int, ...], causal: bool) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (size, taps, (3,))]
    weight = torch.randn(size, dtype=torch.float64)
    results = []
    for impl in ("auto", "reference"):
        out = long_conv(leaves[0], leaves[1], skip=leaves[2], causal=causal, impl=impl)
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.quick
@pytest.mark.parametrize("taps", [1, 4, 5, 9])
def test_equals_numpy(taps: int) -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=9), rng.normal(size=taps)
    full = np.convolve(x, kernel)
    tensors = torch.from_numpy(x)[None, None], torch.from_numpy(kernel)[None]
    np.testing.assert_allclose(long_conv(*tensors)[0, 0], full[:9], atol=1e-12)
    np.testing.assert_allclose(long_conv(*tensors, causal=False)[0, 0], np.convolve(x, kernel, "same"), atol=1e-12)


@pytest.mark.quick
def test_an_impulse_gives_the_kernel_and_does_not_wrap_around() -> None:
    x = torch.zeros(1, 1, 6, dtype=torch.float64)
    x[..., 4] = 1
    out = long_conv(x, torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64))
    assert out.flatten().tolist() == pytest.approx([0, 0, 0, 0, 1, 2])


@pytest.mark.parametrize(("size", "taps", "causal"), [((1, 2, 5), (2, 7), True), ((1, 2, 3, 4), (2, 2, 3), False)])
def test_gradcheck(size: tuple[int, ...], taps: tuple[int, ...], causal: bool) -> None:
    torch.manual_seed(0)
    leaves = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (size, taps))
    assert torch.autograd.gradcheck(lambda x, kernel: long_conv(x, kernel, causal=causal), leaves)


def test_low_precision_is_computed_in_fp32() -> None:
    torch.manual_seed(0)
    x, kernel = torch.randn(1, 2, 33, dtype=torch.bfloat16), torch.randn(2, 33, dtype=torch.bfloat16)
    out = long_conv(x, kernel)
    assert out.dtype == torch.bfloat16
    exact = long_conv(x.double(), kernel.double(), impl="reference")
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


def test_later_tokens_change_earlier_outputs_by_rounding_only() -> None:
    torch.manual_seed(0)
    x, kernel = torch.randn(1, 2, 20, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    changed = torch.cat([x[..., :9], x[..., 9:].flip(2)], 2)
    torch.testing.assert_close(
        long_conv(changed, kernel)[..., :9], long_conv(x, kernel)[..., :9], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("size", [(0, 2, 5), (2, 2, 0), (2, 2, 0, 3)])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_nothing_in_nothing_out(size: tuple[int, ...], impl: str) -> None:
    x = torch.zeros(size, requires_grad=True)
    kernel = torch.ones(2, *([3] * (len(size) - 2)), requires_grad=True)
    out = long_conv(x, kernel, causal=False, impl=impl)
    assert out.shape == size
    out.sum().backward()
    assert kernel.grad is not None
    assert bool((kernel.grad == 0).all())


def test_compiles_without_graph_breaks() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 11), (3, 20))]
    torch._dynamo.reset()
    out = torch.compile(long_conv, fullgraph=True, backend="aot_eager")(*leaves)
    wanted = long_conv(*leaves)
    torch.testing.assert_close(out, wanted)
    got = torch.autograd.grad(out.square().sum(), leaves)
    for mine, theirs in zip(got, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("size", "taps", "offsets"), [((2, 3, 7), (3, 4), [0]), ((1, 2, 4, 5), (2, 3, 2), [1, 0])])
def test_opcheck(size: tuple[int, ...], taps: tuple[int, ...], offsets: list[int]) -> None:
    leaves = [torch.randn(shape, requires_grad=True) for shape in (size, taps)]
    torch.library.opcheck(fft_conv, (*leaves, offsets))


def test_fast_lengths_are_the_next_smooth_even_ones() -> None:
    def smooth(length: int) -> bool:
        for prime in (2, 3, 5):
            while length % prime == 0:
                length //= prime
        return length == 1

    for minimum in range(1, 500):
        length = fast_length(minimum)
        assert length >= minimum
        assert smooth(length)
        assert length % 2 == 0
        assert not any(smooth(other) for other in range(minimum + minimum % 2, length, 2) if other)


def test_the_call_is_recorded() -> None:
    with recording() as records:
        long_conv(torch.zeros(1, 1, 4), torch.zeros(1, 2))
    assert [(entry.op, entry.impl) for entry in records] == [("long_conv", "eager")]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x of shape \(2, 3\) and torch.float32: expected floating \[B, C, N\]"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int64)}, r"x of shape \(2, 3, 4\) and torch.int64"),
        ({"kernel": torch.zeros(2, 5)}, r"kernel of shape \(2, 5\): expected \[3, K\]"),
        ({"kernel": torch.zeros(3, 0)}, r"kernel of shape \(3, 0\): expected \[3, K\] with taps"),
        ({"kernel": torch.zeros(3, 2, 2)}, r"kernel of shape \(3, 2, 2\): expected \[3, K\]"),
        ({"x": torch.zeros(2, 3, 4, 4), "kernel": torch.zeros(3, 2, 2)}, r"causal=True: an image has no past"),
        ({"skip": torch.zeros(2)}, r"skip of shape \(2,\): expected \[3\]"),
        ({"kernel": torch.zeros(3, 2).double()}, r"kernel is torch.float64 on cpu: expected torch.float32 on cpu"),
        ({"impl": "cuda"}, r"impl='cuda': long_conv has 'auto', 'eager', 'reference'"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        long_conv(**({"x": torch.zeros(2, 3, 4), "kernel": torch.zeros(3, 2)} | change))
