"""The C++ engine's gradients against fp64 formulas written here, over drawn shapes, strides, dtypes and patterns."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.kernels import cpu
from saccade.types import BlockLayout

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}"),
]

INF = float("inf")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIMS = st.one_of(st.integers(1, 100), st.sampled_from([32, 64, 80, 128]))
LENGTHS = st.one_of(st.integers(1, 150), st.integers(250, 400))
SANITIZED = "SACCADE_SANITIZED" in os.environ
fuzz = settings(
    max_examples=8 if SANITIZED else 30, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


def strided(shape: tuple[int, int, int, int], form: str, seed: int, dtype: torch.dtype) -> Tensor:
    """Random numbers of a shape, with the memory layout that `form` names."""
    batch, heads, rows, dim = shape
    generator = torch.Generator().manual_seed(seed)
    if form == "transformers":
        return torch.randn(batch, rows, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    if form == "padded":
        return torch.randn(batch, heads, rows, dim + 3, generator=generator).to(dtype)[..., 1 : dim + 1]
    if form == "columns":
        return torch.randn(batch, heads, dim, rows, generator=generator).to(dtype).mT
    return torch.randn(shape, generator=generator).to(dtype)


@st.composite
def problems(draw: Callable) -> dict:
    batch, groups, share = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys, dim, value_dim = draw(LENGTHS), draw(LENGTHS), draw(DIMS), draw(DIMS)
    dtype, seed = DTYPES[draw(st.sampled_from(list(DTYPES)))], draw(st.integers(0, 2**16))
    heads = groups * share
    shapes = [(heads, queries, dim), (groups, keys, dim), (groups, keys, value_dim), (heads, queries, value_dim)]
    forms = [draw(st.sampled_from(["plain", "transformers", "padded", "columns"])) for _ in shapes]
    tensors = [
        strided((batch, *shape), form, seed + i, dtype)
        for i, (shape, form) in enumerate(zip(shapes, forms, strict=True))
    ]
    if draw(st.booleans()):
        tensors[3] = tensors[3].float()  # as `block_attend` hands it over
    grad_lse = strided((batch, heads, queries, 1), "plain", seed + 4, torch.float32)[..., 0]
    scale = draw(st.sampled_from([dim**-0.5, 0.3, -0.2]))
    return {"qkvg": tensors, "grad_lse": grad_lse if draw(st.booleans()) else None, "scale": scale, "seed": seed}


def band_rules(draw: Callable, problem: dict) -> tuple[dict, Tensor]:
    """Rules without a layout, and which pairs they keep."""
    q, k = problem["qkvg"][:2]
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    generator = torch.Generator().manual_seed(problem["seed"] + 9)
    left, right = draw(st.integers(-1, 200)), draw(st.integers(-1, 200))
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    keep = ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))
    keep = keep.expand(batch, heads, queries, keys)
    rules: dict = {"left": left, "right": right, "softcap": draw(st.sampled_from([None, 1.0, 30.0]))}
    if draw(st.booleans()):
        ids = [torch.randint(-1, 3, (batch, size), generator=generator).sort(1).values for size in (queries, keys)]
        rules["segments"] = ids[0], ids[1]
        keep = keep & ((ids[0][:, :, None] == ids[1][:, None]) & (ids[0][:, :, None] >= 0))[:, None]
    if draw(st.booleans()):
        sizes = [draw(st.sampled_from([1, full])) for full in (batch, heads, queries, keys)]
        bias = torch.randn(sizes, generator=generator)
        rules["bias"] = bias.masked_fill(torch.rand(sizes, generator=generator) < 0.1, -INF)
        keep = keep & (rules["bias"] > -INF)
    if draw(st.booleans()):
        rules["alibi"] = torch.rand(heads, generator=generator) * 0.1
    return rules, keep


def layout_rules(draw: Callable, problem: dict) -> tuple[dict, Tensor]:
    """A layout with full, partial and absent blocks and empty rows, and its dense mask, made independently."""
    q, k = problem["qkvg"][:2]
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    block = [draw(st.sampled_from([15, 16, 24, 64, 100, 128, 256])) for _ in range(2)]
    generator = torch.Generator().manual_seed(problem["seed"] + 9)
    shape = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    cells = -(-queries // block[0]), -(-keys // block[1])
    kinds = torch.randint(0, 3, (*shape, *cells), generator=generator)
    kinds = kinds * (torch.rand(*shape, cells[0], 1, generator=generator) > 0.2)
    kinds = kinds.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, :queries, :keys]
    mask = (kinds == 1) | ((kinds == 2) & (torch.rand(kinds.shape, generator=generator) < 0.4))
    softcap = draw(st.sampled_from([None, 1.0]))
    return {"layout": BlockLayout.from_dense(mask, tuple(block)), "softcap": softcap}, mask.expand(batch, heads, -1, -1)


def formula(problem: dict, rules: dict, keep: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of q, k, v in fp64, and how far each may be off: so much of the sizes that are summed up."""
    q, k, v, grad = (x.double() for x in problem["qkvg"])
    share, scale, softcap = q.shape[1] // k.shape[1], problem["scale"], rules.get("softcap")
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores, slope = q @ k.mT * scale, torch.tensor(1.0, dtype=torch.float64)
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh.square()
    scores = scores + rules.get("bias", torch.zeros(())).double()
    if "alibi" in rules:
        distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
        scores = scores - rules["alibi"].double()[:, None, None] * distance.abs()
    exponentials = torch.exp(scores) * keep
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials / total.masked_fill(total == 0, 1.0)
    to_lse = 0.0 if problem["grad_lse"] is None else problem["grad_lse"].double()[..., None]
    dweights = grad @ v.mT
    exact = weights * (dweights - (weights * dweights).sum(-1, keepdim=True) + to_lse) * slope * scale
    sizes = grad.abs() @ v.abs().mT + (grad * (weights @ v)).abs().sum(-1, keepdim=True) + abs(to_lse)
    sizes = weights * sizes * slope * abs(scale)

    def by_group(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, share)).sum(2)

    grads = [exact @ k, by_group(exact.mT @ q), by_group(weights.mT @ grad)]
    bounds = [sizes @ k.abs(), by_group(sizes.mT @ q.abs()), by_group(weights.mT @ grad.abs())]
    rounding = 2**-7 if problem["qkvg"][0].dtype == torch.bfloat16 else 3e-5
    return grads, [bound * rounding + 1e-6 for bound in bounds]


def run(problem: dict, rules: dict) -> tuple[Tensor, ...]:
    """Gradients of q, k and v."""
    q, k, v, grad = problem["qkvg"]
    out, lse = cpu.attention(q, k, v, scale=problem["scale"], **rules)
    return cpu.attention_backward(grad, problem["grad_lse"], q, k, v, out, lse, scale=problem["scale"], **rules)[:3]


@pytest.mark.parametrize("draw_rules", [band_rules, layout_rules])
@fuzz
@given(data=st.data())
def test_agrees_with_the_formula(engine, isa, draw_rules, data):
    problem = data.draw(problems())
    rules, keep = draw_rules(data.draw, problem)
    with engine(isa, data.draw(st.sampled_from([1, 2, 7]))):
        found = run(problem, rules)
    for one, wanted, allowed in zip(found, *formula(problem, rules, keep), strict=True):
        assert bool(((one.double() - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("draw_rules", [band_rules, layout_rules])
@settings(fuzz, max_examples=4 if SANITIZED else 10)
@given(data=st.data())
def test_bits_are_equal_from_run_to_run_and_over_threads(engine, isa, draw_rules, data):
    problem = data.draw(problems())
    rules, _ = draw_rules(data.draw, problem)
    results = []
    for count in (1, 1, 2, 7, 7):
        with engine(isa, count):
            results.append(run(problem, rules))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (33, 129), (129, 33)])
@pytest.mark.parametrize("sides", [(-1, -1), (-1, 0), (20, 0), (11, 5)])
def test_slopes_agree_with_the_formula(engine, isa, dtype, queries, keys, sides):
    shapes = (2, 8, queries, 32), (2, 2, keys, 32), (2, 2, keys, 24), (2, 8, queries, 24)
    tensors = [strided(shape, "plain", seed, dtype) for seed, shape in enumerate(shapes)]
    problem = {"qkvg": tensors, "grad_lse": None, "scale": 0.2}
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    keep = ((distance >= -sides[0]) | (sides[0] < 0)) & ((distance <= sides[1]) | (sides[1] < 0))
    rules = {"left": sides[0], "right": sides[1], "alibi": 2.0 ** -torch.arange(1.0, 9.0)}
    with engine(isa, 2):
        found = run(problem, rules)
    for one, wanted, allowed in zip(found, *formula(problem, rules, keep), strict=True):
        assert bool(((one.double() - wanted).abs() <= allowed).all())


def test_many_spans_of_one_head_add_up_in_order(engine, isa):
    """One head, so that all threads wait for one another; unequal work, so that they do."""
    x = [torch.randn(1, 1, 3000, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    problem = {"qkvg": x, "grad_lse": None, "scale": 0.25}
    table = torch.rand(47, 47, generator=torch.Generator().manual_seed(9)) < torch.linspace(1, 0, 47)
    layout = BlockLayout.from_block_mask(table, 64, 64, 3000, 3000)
    for rules in ({"right": 0}, {"left": 700, "right": 5}, {"layout": layout}):
        with engine(isa, 1):
            alone = run(problem, rules)
        for _ in range(3):
            with engine(isa, 5):
                assert all(torch.equal(a, b) for a, b in zip(run(problem, rules), alone, strict=True))


def test_one_pair_by_hand(engine, isa):
    """Two keys with scores 0 and log 3: weights 1/4 and 3/4."""
    q, grad = torch.tensor([[[[2.0]]]]), torch.tensor([[[[4.0]]]])
    k, v = torch.tensor([[[[0.0], [math.log(3) / 2]]]]), torch.tensor([[[[1.0], [5.0]]]])
    problem = {"qkvg": [q, k, v, grad], "grad_lse": None, "scale": 1.0}
    with engine(isa):
        dq, dk, dv = run(problem, {})
    dscore = 4.0 * 0.25 * 0.75 * (5.0 - 1.0)  # of the second key, and less that of the first
    torch.testing.assert_close(dq, dscore * k[..., 1:, :])
    torch.testing.assert_close(dk, torch.tensor([[[[-2 * dscore], [2 * dscore]]]]))
    torch.testing.assert_close(dv, torch.tensor([[[[1.0], [3.0]]]]))


def test_poison_that_a_query_sees_stays_with_what_it_sees(engine, isa):
    """The lse of such a row is NaN; keys that it does not see keep their gradients."""
    x = [torch.randn(1, 2, 100, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    q, k, v, grad = x
    with engine(isa):
        out, lse = cpu.attention(q, k, v, scale=0.2, right=0)
        clean = cpu.attention_backward(grad, None, q, k, v, out, lse, scale=0.2, right=0)
        out[:, :, 40], lse[:, :, 40] = float("nan"), float("nan")
        found = cpu.attention_backward(grad, None, q, k, v, out, lse, scale=0.2, right=0)
    assert bool(found[0][:, :, 40].isnan().all())
    assert bool(found[1][:, :, :41].isnan().all() and found[2][:, :, :41].isnan().all())
    for a, b in zip(found[1:3], clean[1:3], strict=True):
        assert torch.equal(a[:, :, 41:], b[:, :, 41:])
    assert torch.equal(found[0][:, :, 41:], clean[0][:, :, 41:])


def test_delta_may_be_given(engine, isa):
    x = [torch.randn(1, 2, 90, 20, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    q, k, v, grad = x
    with engine(isa):
        out, lse = cpu.attention(q, k, v, scale=0.2)
        *grads, delta = cpu.attention_backward(grad, lse, q, k, v, out, lse, scale=0.2)
        torch.testing.assert_close(delta, (out * grad).sum(-1) - lse)
        again = cpu.attention_backward(grad, None, q, k, v, torch.zeros(()), lse, delta=delta, scale=0.2)
    assert all(torch.equal(a, b) for a, b in zip(grads, again[:3], strict=True))


def test_rows_out_of_order_are_refused():
    layout = BlockLayout.dense(40, 40, block=16)
    swapped = replace(layout, indices=layout.indices[[1, 0, *range(2, len(layout.indices))]])
    x = [torch.zeros(1, 1, 40, 8) for _ in range(5)]
    with pytest.raises(ValueError, match=r"layout.indices: expected to ascend within each row"):
        cpu.attention_backward(x[0], None, *x[1:4], x[4], x[0][..., 0], scale=1.0, layout=swapped)
