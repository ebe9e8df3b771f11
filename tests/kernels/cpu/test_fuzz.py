"""Drawn shapes, strides, lengths and dtypes for the engine's boxes, scan and lists; the others have theirs beside."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.scan.native import scan_native

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")

EXAMPLES = 5 if "SACCADE_SANITIZED" in os.environ else 15
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DIMS = st.one_of(st.integers(1, 70), st.sampled_from([16, 32, 64]))
FORMS = st.sampled_from(["plain", "tokens first", "gaps", "odd offset", "columns"])
ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.004}


def sized(shape: tuple[int, ...], form: str, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers `[..., heads, tokens, dim]` that lie in memory as `form` says."""
    *front, heads, tokens, dim = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*front, *sizes, generator=generator).to(dtype)

    if form == "tokens first":
        return draw(tokens, heads, dim).transpose(-2, -3)
    if form == "gaps":
        return draw(heads, 3 * tokens, dim)[..., 1::3, :]
    if form == "odd offset":
        return draw(heads, tokens, dim + 5)[..., 3 : dim + 3]
    if form == "columns":
        return draw(heads, dim, tokens).mT
    return draw(heads, tokens, dim)


def window(draw: Callable, size: int, dilation: int) -> tuple[list[int], list[int]]:
    """A window for every coordinate of an axis, within its class, whose ends rise."""
    first, last = [0] * size, [0] * size
    for rest in range(min(dilation, size)):
        members = list(range(rest, size, dilation))
        before, after = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        for place, x in enumerate(members):
            first[x] = members[max(place - before, 0)]
            last[x] = members[min(place + after, len(members) - 1)]
    return first, last


@fuzz
@given(data=st.data())
def test_boxes_agree_with_the_formula(engine: Callable, isa: str, data: st.DataObject) -> None:
    draw = data.draw
    sizes = draw(st.sampled_from([(1,), (37,), (90,), (5, 9), (12, 11), (1, 30), (3, 4, 6)]))
    dilation = [draw(st.integers(1, 3)) for _ in sizes]
    windows = [window(draw, *axis) for axis in zip(sizes, dilation, strict=True)]
    mask = torch.ones(1, 1, dtype=torch.bool)
    for (first, last), step in zip(windows, dilation, strict=True):
        sees = torch.zeros(len(first), len(first), dtype=torch.bool)
        for x, y in itertools.product(range(len(first)), repeat=2):
            sees[x, y] = first[x] <= y <= last[x] and (y - x) % step == 0
        mask = torch.kron(mask, sees)
    groups, share, dtype = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(DTYPES)
    dims = draw(DIMS), draw(DIMS)
    shapes = [(2, heads, len(mask), dim) for heads, dim in ((groups * share, dims[0]), *((groups, d) for d in dims))]
    q, k, v = (sized(shape, draw(FORMS), seed, dtype) for seed, shape in enumerate(shapes))
    ends = [torch.tensor([x for both in windows for x in both[end]]).int() for end in (0, 1)]
    with engine(isa):
        out, lse = cpu.boxes_attention(q, k, v, *ends, list(sizes), dilation, 0.2)
        grad_out, grad_lse = torch.randn(out.shape), torch.randn(lse.shape)
        found = cpu.boxes_gradients(grad_out, grad_lse, q, k, v, out, lse, *ends, list(sizes), dilation, 0.2)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(share, 1) for x in leaves[1:])
    scores = (leaves[0] @ keys.mT * 0.2).masked_fill(~mask, -float("inf"))
    exact = scores.softmax(-1) @ values, scores.logsumexp(-1)
    wanted = torch.autograd.grad(exact, leaves, (grad_out.double(), grad_lse.double()))
    for got, want in zip((out, lse, *found), (*exact, *wanted), strict=True):
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-3, atol=2e-4)


@fuzz
@given(data=st.data())
def test_scans_agree_with_the_recurrence(engine: Callable, isa: str, data: st.DataObject) -> None:
    draw = data.draw
    batch, states, sets = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    tokens, dim, values, dtype = draw(st.integers(1, 150)), draw(DIMS), draw(DIMS), draw(DTYPES)
    q = sized((batch, states, sets, tokens, dim), draw(FORMS), 0, dtype)
    k = sized((batch, states, tokens, dim), draw(FORMS), 1, dtype) * 0.3
    v = sized((batch, states, tokens, values), draw(FORMS), 2, dtype)
    state = torch.randn(batch, states, dim, values, generator=torch.Generator().manual_seed(3))
    form = draw(st.sampled_from([None, (1, states, 1, 1), (batch, states, tokens, 1), (batch, states, tokens, dim)]))
    decay = None if form is None else -torch.rand(form, generator=torch.Generator().manual_seed(4)) * 2
    with engine(isa):
        out, last = scan_native(q, k, v, decay, state, 0.5)
    now, wanted = state.double(), torch.empty(*q.shape[:4], values).double()
    kept = torch.ones(batch, states, tokens, dim).double() if decay is None else decay.double().exp()
    kept = kept.expand(batch, states, tokens, dim)
    for t in range(tokens):
        now = kept[:, :, t, :, None] * now + k[:, :, t, :, None].double() * v[:, :, t, None].double()
        wanted[:, :, :, t] = (q[:, :, :, t].double() @ now) * 0.5
    size = float(wanted.abs().max()) + 1
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=ERROR[dtype] * size)
    torch.testing.assert_close(last.double(), now, rtol=0, atol=1e-3 * (float(now.abs().max()) + 1))


@fuzz
@given(data=st.data())
def test_lists_agree_with_the_formula(engine: Callable, isa: str, data: st.DataObject) -> None:
    draw = data.draw
    groups, share, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    queries, keys, length = draw(st.integers(1, 12)), draw(st.integers(1, 200)), draw(st.integers(1, 90))
    dims, dtype, causal = (draw(DIMS), draw(DIMS)), draw(DTYPES), draw(st.booleans())
    shapes = [(2, groups * share, queries, dims[0]), *((2, groups, keys, dim) for dim in dims)]
    q, k, v = (sized(shape, draw(FORMS), seed, dtype) for seed, shape in enumerate(shapes))
    heads = draw(st.sampled_from([1, groups, groups * share]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    lists = torch.rand(2, heads, -(-queries // group), keys, generator=generator).argsort(-1)[..., :length]
    lists = lists.masked_fill(torch.rand(lists.shape, generator=generator) < 0.3, -1)
    mask = torch.zeros(*lists.shape[:3], keys + 1, dtype=torch.bool)
    mask = mask.scatter(-1, lists.where(lists >= 0, keys), value=True)[..., :keys]
    mask = mask.repeat_interleave(group, 2)[:, :, :queries].repeat_interleave(groups * share // heads, 1)
    if causal:
        mask = mask & (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries)
    with engine(isa):
        out, lse = cpu.decoding(q, k, v, scale=0.2, right=0 if causal else -1, lists=lists, group=group)
    keys_of, values = (x.double().repeat_interleave(share, 1) for x in (k, v))
    scores = (q.double() @ keys_of.mT * 0.2).masked_fill(~mask, -float("inf"))
    wanted = scores.logsumexp(-1)
    weights = (scores - wanted.masked_fill(wanted == -float("inf"), 0.0)[..., None]).exp()
    torch.testing.assert_close(out.double(), weights @ values, rtol=0, atol=4 * ERROR[dtype])
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-3, atol=1e-3)
