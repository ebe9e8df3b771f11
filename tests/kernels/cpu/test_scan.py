"""The C++ engine's scan against an fp64 formula written here: every decay, dtype and instruction set; its promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.scan import scan
from saccade.ops.scan.native import scan_native

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")

SHAPES = [  # batch, states, sets, tokens, channels, values
    (2, 3, 2, 21, 5, 3),
    (1, 2, 1, 70, 64, 65),
    (1, 1, 2, 100, 33, 16),
    (2, 1, 1, 64, 32, 40),
    (1, 2, 2, 1, 7, 9),
]
DECAYS = ("none", "head", "head channel", "token", "channel")
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def problem(
    shape: tuple[int, ...], decay: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor | None]:
    """q, k, v, log_decay and state; the decays of neighbouring tokens differ by orders of magnitude."""
    batch, states, sets, tokens, dim, values = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    sizes = {
        "none": None, "head": (1, states, 1, 1), "head channel": (1, states, 1, dim),
        "token": (batch, states, tokens, 1), "channel": (1, states, tokens, dim),
    }[decay]  # fmt: skip
    log_decay = None
    if sizes is not None:
        strength = 10.0 ** torch.randint(-3, 1, sizes, generator=generator)
        log_decay = -2 * torch.rand(sizes, generator=generator) * strength
    q, k = normal(batch, states, sets, tokens, dim), normal(batch, states, tokens, dim) / 2
    v, state = normal(batch, states, tokens, values), normal(batch, states, dim, values)
    return [q.to(dtype), k.to(dtype), v.to(dtype), log_decay, state]


def formula(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """All pairs at once: the decay between tokens j and i is exp of the sum of the logs after j up to i."""
    tokens = k.shape[2]
    logs = torch.zeros(1, 1, 1, 1, dtype=k.dtype) if log_decay is None else log_decay
    summed = logs.expand(*k.shape).cumsum(2)
    between = (summed[:, :, :, None] - summed[:, :, None]).masked_fill(
        torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[..., None], -torch.inf
    )
    weights = torch.einsum("bsrid,bsjd,bsijd->bsrij", q, k, between.exp())
    out = weights @ v[:, :, None] + torch.einsum("bsrid,bsid,bsde->bsrie", q, summed.exp(), state)
    to_end = (summed[:, :, -1:] - summed).exp()
    last = summed[:, :, -1].exp()[..., None] * state + (k * to_end).mT @ v
    return out * scale, last


def gradients(run, inputs: list[Tensor | None], dout: Tensor, dlast: Tensor) -> list[Tensor]:  # noqa: ANN001
    """Results and the gradients of all inputs."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out, last = run(*leaves, 0.5)
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad((out, last), wanted, (dout.to(out.dtype), dlast.to(last.dtype)))
    return [out, last, *grads]


def check(inputs: list[Tensor | None], seed: int = 1) -> None:
    """Forward and backward against the formula in fp64."""
    q, _, v, _, state = inputs
    assert q is not None
    assert v is not None
    assert state is not None
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(*q.shape[:4], v.shape[3], generator=generator).to(q.dtype)
    dlast = torch.randn(state.shape, generator=generator)
    exact = gradients(formula, [None if x is None else x.double() for x in inputs], dout.double(), dlast.double())
    for got, want in zip(gradients(scan_native, inputs, dout, dlast), exact, strict=True):
        bound = ROUNDING[got.dtype] * float(want.detach().abs().max()) + 1e-5
        torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)


@pytest.mark.quick
@pytest.mark.parametrize("decay", DECAYS)
def test_outputs_states_and_gradients_are_those_of_the_formula(engine: Callable, isa: str, decay: str) -> None:
    with engine(isa):
        for shape in SHAPES:
            check(problem(shape, decay))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_stored_rounded_once_and_computed_in_fp32(engine: Callable, isa: str, dtype: torch.dtype) -> None:
    with engine(isa):
        for decay in ("token", "channel"):
            inputs = problem((1, 2, 2, 45, 24, 20), decay, dtype)
            check(inputs)
            out, last = scan_native(*inputs, 0.5)
            exact, exact_last = formula(*(None if x is None else x.double() for x in inputs), 0.5)
            torch.testing.assert_close(last.double(), exact_last, rtol=0, atol=1e-5)
            unit = torch.finfo(dtype).eps / 2
            assert bool(((out.double() - exact).abs() <= exact.abs() * unit * 1.01 + 1e-5).all())


@pytest.mark.parametrize("value", [1e-7, 3e-6, 6e4, 65519.0, 65521.0, 1e6, torch.inf, torch.nan])
def test_halves_at_the_ends_of_their_range(engine: Callable, isa: str, value: float) -> None:
    with engine(isa):
        for dtype in (torch.float16, torch.bfloat16):
            q, one = torch.ones(1, 1, 1, 2, 1, dtype=dtype), torch.ones(1, 1, 2, 1, dtype=dtype)
            start = torch.full((1, 1, 1, 1), value)
            out = scan_native(q, 0 * one, one, None, start, 1.0)[0]
            torch.testing.assert_close(
                out.flatten(), start.to(dtype).flatten().expand(2), rtol=0, atol=0, equal_nan=True
            )


def strided(x: Tensor) -> Tensor:
    """The same numbers in `[B, tokens, heads, dim]` order of memory, as transformers keep them."""
    return x.transpose(-2, 1).contiguous().transpose(-2, 1)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_strides_change_no_bit(decay: str) -> None:
    inputs = problem((2, 3, 2, 40, 17, 19), decay)
    plain = scan_native(*inputs, 0.5)
    moved = scan_native(*(x if x is None else strided(x) for x in inputs), 0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize(("states", "tokens"), [(1, 2600), (2, 1100), (3, 1030)])
def test_the_number_of_threads_changes_no_bit(engine: Callable, decay: str, states: int, tokens: int) -> None:
    inputs = problem((1, states, 2, tokens, 24, 40), decay)
    dout, dlast = torch.ones(1, states, 2, tokens, 40), torch.ones(1, states, 24, 40)
    results = []
    for count in (1, 2, 7, 2):
        with engine(threads=count):
            results.append(gradients(scan_native, inputs, dout, dlast))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_a_long_sequence_agrees_with_its_pieces(decay: str) -> None:
    inputs = problem((1, 1, 1, 1300, 16, 24), decay)
    q, k, v, log_decay, state = inputs
    whole, last = scan_native(*inputs, 0.5)
    parts = []
    for start, stop in ((0, 1), (1, 700), (700, 1300)):
        cut = None if log_decay is None else log_decay[:, :, start:stop]
        out, state = scan_native(q[:, :, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], cut, state, 0.5)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 3), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


def test_results_large_enough_for_large_pages_agree_with_pieces() -> None:
    inputs = problem((1, 8, 1, 8250, 16, 64), "head")  # 16 MiB and a part of a page
    q, k, v, log_decay, state = inputs
    whole, last = scan_native(*inputs, 0.5)
    cut = 4128  # a whole number of chunks
    first, state = scan_native(q[:, :, :, :cut], k[:, :, :cut], v[:, :, :cut], log_decay, state, 0.5)
    second, state = scan_native(q[:, :, :, cut:], k[:, :, cut:], v[:, :, cut:], log_decay, state, 0.5)
    torch.testing.assert_close(torch.cat((first, second), 3), whole, rtol=0, atol=0)
    torch.testing.assert_close(state, last, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_what_later_tokens_hold_reaches_no_earlier_one(decay: str, bad: float) -> None:
    clean = problem((1, 2, 2, 75, 16, 20), decay)
    dout, dlast = torch.ones(1, 2, 2, 75, 20), torch.zeros(1, 2, 16, 20)
    for t in (3, 31, 32, 74):
        dout[:, :, :, t:] = 0
        wanted = scan_native(*clean, 0.5)[0]
        for spoilt in (1, 2):
            inputs = [None if x is None else x.clone() for x in clean]
            inputs[spoilt][:, :, t] = bad
            got = gradients(scan_native, inputs, dout, dlast)
            torch.testing.assert_close(got[0][:, :, :, :t], wanted[:, :, :, :t], rtol=1e-5, atol=1e-5)
            assert not bool(got[0][:, :, :, t].isfinite().all())
            assert all(bool(grad[..., :t, :].isfinite().all()) for grad in got[2:5])
        dout = torch.ones_like(dout)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_a_decay_of_minus_infinity_forgets_exactly(decay: str) -> None:
    inputs = problem((1, 2, 1, 50, 8, 8), decay)
    inputs[3][:, :, 20] = -torch.inf
    out, last = scan_native(*inputs, 0.5)
    fresh = [x if x is None else x[..., 20:, :] for x in inputs[:4]]
    fresh[3] = fresh[3].clone()
    alone, alone_last = scan_native(*fresh, torch.zeros_like(inputs[4]), 0.5)
    torch.testing.assert_close(out[..., 20:, :], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, alone_last, rtol=1e-5, atol=1e-6)
    grads = gradients(scan_native, inputs, torch.ones_like(out), torch.zeros_like(last))
    assert all(bool(grad.isfinite().all()) for grad in grads)
    torch.testing.assert_close(grads[5][:, :, 20], torch.zeros_like(grads[5][:, :, 20]), rtol=0, atol=1e-4)


def test_through_the_public_function_with_groups_and_normaliser() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(2, 4, 50, 12, generator=generator)
    k, v = torch.rand(2, 2, 50, 12, generator=generator), torch.randn(2, 2, 50, 9, generator=generator)
    log_decay = -torch.rand(2, 4, 50, generator=generator)
    for options in ({}, {"normalise": True}, {"log_decay": log_decay}, {"log_decay": log_decay, "normalise": True}):
        got, state = scan(q, k, v, impl="cpu", **options)
        exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
        want, last = scan(q.double(), k.double(), v.double(), impl="reference", **exact)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(state, last, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
        cut = {name: x[:, :, :1] if isinstance(x, Tensor) else x for name, x in options.items()}
        got = scan(q[:, :, :1], k[:, :, :1], v[:, :, :1], initial_state=state, impl="cpu", **cut)
        want = scan(q[:, :, :1], k[:, :, :1], v[:, :, :1], initial_state=state, impl="reference", **cut)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": torch.ones(1, 2, 5)}, "impl='cpu': scan cannot run it here: the delta rule is not in the C"),
        ({"form": "parallel"}, "form='parallel' is one chunk of all tokens"),
        ({"dtype": torch.float64}, "computes in fp32, q is fp64"),
        ({"device": "meta"}, "works on CPUs, q is on meta"),
        ({"tokens": 0}, "the problem is empty"),
    ],
)
def test_what_it_does_not_serve_is_refused(options: dict, message: str) -> None:
    made = {name: options.pop(name) for name in ("dtype", "device") if name in options}
    x = torch.zeros(1, 2, options.pop("tokens", 5), 4, **made)
    with pytest.raises(ValueError, match=message):
        scan(x, x, x, impl="cpu", **options)


@pytest.mark.parametrize("decay", ["none", "channel"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_opcheck(tokens: int, decay: str) -> None:
    inputs = [x if x is None else x.requires_grad_() for x in problem((1, 2, 2, tokens, 3, 3), decay)]
    torch.library.opcheck(scan_native, (*inputs, 0.5))


def test_compiles_without_graph_breaks() -> None:
    inputs = [x.requires_grad_() for x in problem((1, 2, 1, 40, 8, 8), "token")]
    q, k, v, log_decay, _ = inputs

    def call() -> Tensor:
        return scan(q[:, :, 0], k, v, log_decay=log_decay[..., 0], impl="cpu")[0]

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(compiled, call(), rtol=0, atol=0)
    wanted = torch.autograd.grad(call().square().sum(), (q, k, v, log_decay))
    got = torch.autograd.grad(compiled.square().sum(), (q, k, v, log_decay))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
