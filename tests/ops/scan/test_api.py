"""scan: every form equals the recurrence, for outputs, states and gradients; its other promises; its refusals."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.dispatch import recording
from saccade.ops.scan import ScanState, diagonal_scan, linear_mix, scan
from saccade.ops.scan.eager import scan_chunk

BATCH, HEADS, GROUPS, TOKENS, DIM, VALUES = 2, 4, 2, 21, 5, 3
DECAYS = {
    "none": None,
    "head": (HEADS,),
    "group": (GROUPS,),
    "head channel": (HEADS, DIM),
    "token": (BATCH, HEADS, TOKENS),
    "shared token": (1, GROUPS, TOKENS),
    "channel": (BATCH, GROUPS, TOKENS, DIM),
}
MODES = ("plain", "normalise", "delta", "delta per head")


def problem(decay: str, mode: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arguments of a small call, as leaves."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "q": normal(BATCH, HEADS, TOKENS, DIM),
        "k": normal(BATCH, GROUPS, TOKENS, DIM) / 2,
        "v": normal(BATCH, GROUPS, TOKENS, VALUES),
    }
    if mode == "normalise":
        inputs["q"], inputs["k"] = inputs["q"].exp(), inputs["k"].exp()
    shape = DECAYS[decay]
    if shape is not None:
        inputs["log_decay"] = -2 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    if mode.startswith("delta"):
        heads = GROUPS if mode == "delta" else HEADS
        inputs["beta"] = torch.rand(BATCH, heads, TOKENS, generator=generator, dtype=torch.float64)
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def run(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, ...]:
    """Output, state and the gradient of every argument."""
    out, state = scan(**inputs, **options)
    loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum() + state.s.square().sum()
    if state.z is not None:
        loss = loss + state.z.pow(3).sum() / 10
    return (out, *(x for x in state if x is not None), *torch.autograd.grad(loss, list(inputs.values())))


def options_of(mode: str) -> dict[str, object]:
    return {"normalise": mode == "normalise", "scale": 0.7}


@pytest.mark.quick
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("decay", DECAYS)
def test_every_form_equals_the_recurrence(decay: str, mode: str) -> None:
    inputs = problem(decay, mode)
    wanted = run(inputs, impl="reference", **options_of(mode))
    for form, chunk in (("chunk", 8), ("chunk", 6), ("chunk", 1), ("chunk", 64), ("parallel", 64)):
        for got, want in zip(run(inputs, form=form, chunk=chunk, **options_of(mode)), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("cuts", [(0, 9, 10, 21), tuple(range(TOKENS + 1))])
def test_carried_state_equals_one_call(decay: str, mode: str, cuts: tuple[int, ...]) -> None:
    inputs = problem(decay, mode)
    whole, last = scan(**inputs, chunk=4, **options_of(mode))
    state, parts = None, []
    for start, stop in pairwise(cuts):
        piece = {name: x[:, :, start:stop] if x.ndim > 2 else x for name, x in inputs.items()}
        out, state = scan(**piece, initial_state=state, chunk=4, **options_of(mode))
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-10, atol=1e-10)
    for got, want in zip(state, last, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["chunk", "step"])
@pytest.mark.parametrize("mode", ["plain", "delta"])
def test_gradient_of_the_initial_state(form: str, mode: str) -> None:
    tokens = 1 if form == "step" else 7
    inputs = {name: x[:, :, :tokens].detach() for name, x in problem("channel", mode).items()}
    start = torch.randn(BATCH, GROUPS, DIM, VALUES, dtype=torch.float64, requires_grad=True)
    grads = []
    for options in ({"impl": "reference"}, {"form": form, "chunk": 3}):
        out, state = scan(**inputs, initial_state=ScanState(start), **options)
        grads.append(torch.autograd.grad(out.square().sum() + state.s.pow(3).sum(), start)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["plain", "normalise", "delta"])
@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
def test_gradcheck(decay: str, mode: str) -> None:
    inputs = {
        name: (x[:1, :, :5] if x.ndim > 2 else x).detach().requires_grad_() for name, x in problem(decay, mode).items()
    }

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        out, state = scan(**dict(zip(inputs, values, strict=True)), chunk=2, normalise=mode == "normalise")
        return (out, *(x for x in state if x is not None))

    assert torch.autograd.gradcheck(call, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
@pytest.mark.parametrize("mode", ["plain", "delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_no_more_than_the_reference_in_that_precision(
    decay: str, mode: str, dtype: torch.dtype
) -> None:
    inputs = problem(decay, mode, dtype)
    exact = run({name: x.detach().double().requires_grad_() for name, x in inputs.items()}, impl="reference")
    same = run(inputs, impl="reference")
    mine = run(inputs, chunk=8)
    for got, plain, want in zip(mine, same, exact, strict=True):
        assert got.dtype == plain.dtype
        error, allowed = (got.double() - want).norm(), (plain.double() - want).norm()
        assert error <= 2 * allowed + 1e-6 * want.norm()


@pytest.mark.quick
def test_dtypes() -> None:
    out, state = scan(**problem("token", "plain", torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert state.s.dtype == torch.float32
    assert scan(**problem("token", "plain"))[1].s.dtype == torch.float64


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = {name: x.detach() for name, x in problem("token", "delta", torch.float32).items()}
    plain = scan(**inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(scan(**inputs)[0], plain, rtol=0, atol=0)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_strong_decays_neither_overflow_nor_lose_near_tokens(decay: str) -> None:
    inputs = problem(decay, "plain", torch.float32)
    inputs["log_decay"] = (inputs["log_decay"] * 40).detach().requires_grad_()
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    for got, want in zip(run(inputs, chunk=16), run(exact, impl="reference"), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(HEADS,), (BATCH, HEADS, TOKENS), (BATCH, HEADS, TOKENS, DIM)])
def test_a_decay_of_minus_infinity_forgets(shape: tuple[int, ...]) -> None:
    inputs = {name: x.detach() for name, x in problem("none", "plain").items()}
    log_decay = torch.zeros(shape, dtype=torch.float64)
    if len(shape) == 1:
        log_decay[:] = -torch.inf
    else:
        log_decay[:, :, 11] = -torch.inf
    got, want = (scan(**inputs, log_decay=log_decay, chunk=8, impl=impl) for impl in ("auto", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.quick
def test_known_by_hand() -> None:
    """k = v = q = 1, decay 1/2: out = 1, 3/2, 7/4; under the delta rule with beta 1 the state stays 1."""
    ones = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    half = torch.full((1,), 0.5, dtype=torch.float64).log()
    assert scan(ones, ones, ones, log_decay=half)[0].flatten().tolist() == pytest.approx([1, 1.5, 1.75])
    assert scan(ones, ones, ones, beta=ones[..., 0])[0].flatten().tolist() == pytest.approx([1, 1, 1])
    assert scan(ones, ones, ones, normalise=True)[0].flatten().tolist() == pytest.approx([1, 1, 1])


def test_default_scale_is_that_of_the_other_engines() -> None:
    inputs = problem("none", "plain")
    torch.testing.assert_close(scan(**inputs)[0], scan(**inputs, scale=DIM**-0.5)[0])


def test_delta_rule_replaces_what_a_key_held() -> None:
    keys = torch.eye(3, dtype=torch.float64)[[0, 1, 0]][None, None]
    values = torch.tensor([[[[1.0], [2.0], [5.0]]]], dtype=torch.float64)
    _, state = scan(keys, keys, values, beta=torch.ones(1, 1, 3, dtype=torch.float64))
    assert state.s.flatten().tolist() == pytest.approx([5, 2, 0])


def test_a_zero_denominator_gives_zero_and_no_gradient() -> None:
    q, k, v = (torch.zeros(1, 1, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, _ = scan(q, k, v, normalise=True)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool((x == 0).all()) for x in (out, *grads))


@pytest.mark.parametrize("normalise", [False, True])
def test_no_tokens(normalise: bool) -> None:
    empty = torch.zeros(2, 4, 0, 3, requires_grad=True)
    start = torch.randn(2, 4, 3, 3)
    state = ScanState(start, start[..., 0] if normalise else None)
    out, after = scan(empty, empty, empty, initial_state=state, normalise=normalise)
    assert out.shape == (2, 4, 0, 3)
    torch.testing.assert_close(after.s, start)
    out.sum().backward()
    assert empty.grad is not None


@pytest.mark.parametrize("mode", ["plain", "delta"])
@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_later_tokens_leave_earlier_outputs_bit_equal(decay: str, mode: str) -> None:
    inputs = {name: x.detach() for name, x in problem(decay, mode, torch.float32).items()}
    whole = scan(**inputs, chunk=8)[0]
    for t in (1, 5, 8, 13):
        changed = {name: x.clone() for name, x in inputs.items()}
        for x in changed.values():
            if x.ndim > 2:
                x[:, :, t:] = x[:, :, t:].flip(2) * 0.5
        assert torch.equal(scan(**changed, chunk=8)[0][:, :, :t], whole[:, :, :t])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("decay", ["none", "channel"])
def test_compiles_without_graph_breaks(decay: str, mode: str) -> None:
    inputs = problem(decay, mode)

    def call(values: dict[str, Tensor]) -> tuple[Tensor, ScanState]:
        return scan(**values, chunk=8, **options_of(mode))

    torch._dynamo.reset()
    out, state = torch.compile(call, fullgraph=True, backend="aot_eager")(inputs)
    wanted, wanted_state = call(inputs)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(state.s, wanted_state.s)
    got = torch.autograd.grad(out.square().sum(), list(inputs.values()))
    for mine, theirs in zip(got, torch.autograd.grad(wanted.square().sum(), list(inputs.values())), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("tokens", [1, 7, 8])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(tokens: int, full: bool) -> None:
    q, k, v = (torch.randn(1, 2, tokens, 3, requires_grad=True) for _ in range(3))
    decay = -torch.rand(1, 2, tokens, 1) if full else None
    beta = torch.rand(1, 2, tokens, requires_grad=True) if full else None
    state = torch.randn(1, 2, 3, 3, requires_grad=True)
    torch.library.opcheck(scan_chunk, (q[:, :, None], k, v, decay, beta, state, 0.5, 4))


def test_the_call_is_recorded() -> None:
    x = torch.randn(1, 1, 4, 2)
    with recording() as records:
        scan(x, x, x)
        scan(x, x, x, impl="reference")
        scan(x, x, x, beta=x[..., 0])
    first = "eager" if cpu.missing() else "cpu"
    assert [(entry.op, entry.impl) for entry in records] == [("scan", first), ("scan", "reference"), ("scan", "eager")]
    assert records[2].refused == {"cpu": "the delta rule is not in the C++ engine"}


def test_linear_mix_sums_over_all_keys() -> None:
    torch.manual_seed(0)
    q, k = torch.rand(2, 4, 6, 3, dtype=torch.float64), torch.rand(2, 2, 9, 3, dtype=torch.float64)
    v = torch.randn(2, 2, 9, 5, dtype=torch.float64)
    weights = q @ k.repeat_interleave(2, 1).mT
    values = v.repeat_interleave(2, 1)
    torch.testing.assert_close(linear_mix(q, k, v, normalise=False, scale=1.0), weights @ values)
    torch.testing.assert_close(linear_mix(q, k, v), weights / weights.sum(-1, keepdim=True) @ values)
    assert bool((linear_mix(torch.zeros_like(q), k, v) == 0).all())


def test_diagonal_scan_is_a_state_space() -> None:
    torch.manual_seed(0)
    batch, channels, tokens, states = 2, 3, 11, 4
    u = torch.randn(batch, channels, tokens, dtype=torch.float64)
    b, c = (torch.randn(batch, channels, tokens, states, dtype=torch.float64) for _ in range(2))
    decay = -torch.rand(batch, channels, tokens, states, dtype=torch.float64)
    x, outputs = torch.randn(batch, channels, states, dtype=torch.float64), []
    start = x
    for t in range(tokens):
        x = decay[:, :, t].exp() * x + b[:, :, t] * u[:, :, t, None]
        outputs.append((c[:, :, t] * x).sum(-1))
    y, last = diagonal_scan(u, decay, b, c, initial_state=start, chunk=4)
    torch.testing.assert_close(y, torch.stack(outputs, 2))
    torch.testing.assert_close(last, x)


def test_diagonal_scan_with_fixed_matrices_is_a_convolution() -> None:
    torch.manual_seed(0)
    u = torch.randn(1, 2, 9, dtype=torch.float64)
    b, c = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    decay = -torch.rand(2, 3, dtype=torch.float64)
    kernel = torch.stack([(c * b * (decay * t).exp()).sum(-1) for t in range(9)], 1)
    wanted = torch.stack([(kernel[:, : t + 1].flip(1) * u[:, :, : t + 1]).sum(-1) for t in range(9)], 2)
    torch.testing.assert_close(diagonal_scan(u, decay, b, c, chunk=4)[0], wanted)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 2, 4, 3), "v": torch.zeros(2, 2, 4, 3)}, r"k of shape \(2, 2, 4, 3\): expected 5 tokens"),
        ({"k": torch.zeros(2, 3, 5, 3), "v": torch.zeros(2, 3, 5, 3)}, r"k with 3 heads: expected a divisor"),
        ({"log_decay": torch.zeros(3)}, r"log_decay of shape \(3,\) and torch.float32: expected floating \[4\]"),
        ({"log_decay": torch.zeros(2, 4, 6)}, r"log_decay of shape \(2, 4, 6\)"),
        ({"log_decay": torch.zeros(2, 4, 5, 2)}, r"log_decay of shape \(2, 4, 5, 2\)"),
        ({"log_decay": torch.zeros(4, dtype=torch.int64)}, r"log_decay of shape \(4,\) and torch.int64"),
        ({"log_decay": torch.zeros(())}, r"log_decay of shape \(\)"),
        ({"log_decay": torch.zeros(4, device="meta")}, r"log_decay on meta: expected cpu"),
        ({"beta": torch.zeros(2, 4)}, r"beta of shape \(2, 4\)"),
        ({"beta": torch.zeros(2, 3, 5)}, r"beta of shape \(2, 3, 5\)"),
        ({"beta": torch.zeros(2, 4, 5), "normalise": True}, r"normalise=True: not defined with beta"),
        ({"chunk": 0}, r"chunk=0: expected at least 1 token"),
        ({"form": "loop"}, r"form='loop': expected 'auto', 'chunk', 'step' or 'parallel'"),
        ({"form": "step"}, r"form='step' with 5 tokens: expected one token"),
        ({"impl": "triton"}, r"impl='triton': scan has 'auto', 'cpu', 'eager', 'reference'"),
        ({"initial_state": (torch.zeros(2, 4, 3, 3), None)}, r"initial_state.s of shape \(2, 4, 3, 3\): expected"),
        ({"initial_state": (torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 3))}, r"initial_state.z: expected None"),
        ({"initial_state": (torch.zeros(2, 2, 3, 3), None), "normalise": True}, r"initial_state.z None: expected"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    call = {"q": torch.zeros(2, 4, 5, 3), "k": torch.zeros(2, 2, 5, 3), "v": torch.zeros(2, 2, 5, 3)} | change
    with pytest.raises(ValueError, match=message):
        scan(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(1, 2)}, r"u of shape \(1, 2\): expected \[batch, channels, tokens\]"),
        ({"b": torch.zeros(3, 3)}, r"b of shape \(3, 3\): expected \[2, D\]"),
        ({"c": torch.zeros(1, 5, 4, 3)}, r"c of shape \(1, 5, 4, 3\): expected \[2, D\]"),
        ({"c": torch.zeros(4)}, r"c of shape \(4,\): expected \[2, D\]"),
    ],
)
def test_bad_state_spaces_are_refused(change: dict[str, Tensor], message: str) -> None:
    call = {"u": torch.zeros(1, 2, 4), "b": torch.zeros(2, 3), "c": torch.zeros(2, 3)} | change
    with pytest.raises(ValueError, match=message):
        diagonal_scan(log_decay=torch.zeros(2), **call)
