"""`block_attend` against a dense oracle in fp64, its edge cases and its refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from saccade.ops.block_attend import block_attend
from saccade.ops.dispatch import recording
from saccade.types import AttentionOutput, BlockLayout

SHAPES = {
    # name: B, H, G, M, N, D, E, block, layout batch, layout heads
    "square": (1, 2, 2, 64, 64, 8, 8, (16, 16), 1, 1),
    "gqa shared by heads": (2, 6, 2, 37, 41, 8, 8, (8, 8), 1, 1),
    "gqa per head": (2, 4, 2, 37, 41, 8, 8, (8, 8), 1, 4),
    "per batch": (2, 4, 2, 33, 50, 8, 8, (16, 8), 2, 1),
    "per batch and head": (2, 4, 1, 20, 70, 4, 4, (8, 32), 2, 4),
    "values wider than keys": (1, 2, 1, 30, 30, 4, 10, (16, 16), 1, 2),
    "one block, more keys inside it than there are": (1, 2, 2, 5, 3, 4, 4, (16, 8), 1, 1),
}


def oracle(q, k, v, mask, softcap=None, sinks=None, scale=None):
    """Dense attention in the dtype of q; rows without a key give 0 and lse -inf."""
    ratio = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    exponentials = torch.exp(scores) * mask
    total = exponentials.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks)[None, :, None]
    some = total > 0
    safe = torch.where(some, total, 1.0)
    return exponentials @ v / safe[..., None], torch.where(some, safe.log(), -torch.inf)


def problem(name, density=0.3, seed=0, dtype=torch.float64):
    """Inputs that need gradients, a token mask with an empty row, a full corner and its layout."""
    batch, heads, groups, queries, keys, dim, value_dim, block, layout_batch, layout_heads = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, queries, dim), (groups, keys, dim), (groups, keys, value_dim))
    q, k, v = (torch.randn(batch, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    mask = torch.rand(layout_batch, layout_heads, queries, keys, generator=generator) < density
    mask[..., block[0] :, :] &= torch.rand(layout_batch, layout_heads, 1, keys, generator=generator) < 0.8
    mask[..., : block[0], : block[1]] = True
    mask[..., 3, :] = False
    return [x.requires_grad_() for x in (q, k, v)], mask, BlockLayout.from_dense(mask, block)


def gradients(out, lse, inputs, seed=1):
    """Gradients of a random function of out and of the finite part of lse."""
    generator = torch.Generator().manual_seed(seed)
    to_out, to_lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, lse))
    loss = (out * to_out).sum() + (torch.where(lse == -torch.inf, 0.0, lse) * to_lse).sum()
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_agrees_with_dense(name, impl, softcap, with_sinks):
    inputs, mask, layout = problem(name)
    sinks = torch.linspace(-1, 1, inputs[0].shape[1], dtype=torch.float64, requires_grad=True) if with_sinks else None
    wanted = inputs + [sinks] * with_sinks
    expected = oracle(*inputs, mask, softcap, sinks, scale=0.4)
    found = block_attend(*inputs, layout, softcap=softcap, sinks=sinks, scale=0.4, return_lse=True, impl=impl)
    assert isinstance(found, AttentionOutput)
    torch.testing.assert_close(tuple(found), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(*found, wanted), gradients(*expected, wanted), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_out_alone(name, dtype):
    inputs, mask, layout = problem(name, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = torch.autograd.grad(block_attend(*inputs, layout).square().sum(), inputs)
    expected = torch.autograd.grad(oracle(*exact, mask)[0].square().sum(), exact)
    torch.testing.assert_close(found, tuple(grad.to(dtype) for grad in expected))


@pytest.mark.parametrize("workspace", [1, 3000, 40_000, 2**30])
@pytest.mark.parametrize("name", ["gqa shared by heads", "per batch and head", "values wider than keys"])
def test_any_workspace_gives_the_same(name, workspace):
    inputs, mask, layout = problem(name)
    found = block_attend(*inputs, layout, return_lse=True, workspace=workspace)
    expected = oracle(*inputs, mask)
    torch.testing.assert_close(tuple(found), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(*found, inputs), gradients(*expected, inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.quick
@pytest.mark.parametrize(("queries", "keys"), [(96, 96), (40, 100), (100, 40)])
@pytest.mark.parametrize("block", [16, (16, 32), (32, 16), 64])
@pytest.mark.parametrize("window", [(20, 0), (-1, 0), (33, 7), (-1, -1)])
def test_windows(queries, keys, block, window):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 3, queries, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, 1, keys, 8, generator=generator, dtype=torch.float64)
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    mask = torch.ones_like(distance, dtype=torch.bool)
    mask &= (distance <= window[0]) if window[0] >= 0 else True
    mask &= (-distance <= window[1]) if window[1] >= 0 else True
    found = block_attend(q, k, v, BlockLayout.window(queries, keys, *window, block=block), return_lse=True)
    torch.testing.assert_close(tuple(found), oracle(q, k, v, mask), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", ["gqa shared by heads", "values wider than keys"])
def test_gradcheck(name, softcap):
    inputs, _, layout = problem(name)
    inputs = [x.detach()[:1, ..., :3].requires_grad_() for x in inputs]
    sinks = torch.zeros(inputs[0].shape[1], dtype=torch.float64, requires_grad=True)

    def run(q, k, v, sinks):
        return block_attend(q, k, v, layout, softcap=softcap, sinks=sinks, return_lse=True)

    assert torch.autograd.gradcheck(run, (*inputs, sinks), fast_mode=True)


@pytest.mark.quick
def test_one_key_by_hand():
    layout = BlockLayout.from_dense(torch.eye(3, dtype=torch.bool), 2)
    v = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])[None, None]
    q = k = torch.full((1, 1, 3, 2), 2.0)
    out, lse = block_attend(q, k, v, layout, scale=0.5, return_lse=True)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(lse, torch.full((1, 1, 3), 4.0))
    halved = block_attend(q, k, v, layout, scale=0.5, sinks=torch.tensor([4.0]))
    torch.testing.assert_close(halved, v / 2)


@pytest.mark.quick
def test_empty_rows():
    inputs, mask, layout = problem("gqa per head", density=0.02)
    out, lse = block_attend(*inputs, layout, return_lse=True)
    empty = ~mask.any(-1).expand(2, -1, -1)
    assert empty.sum() > 8
    assert bool((out[empty] == 0).all())
    assert bool((lse[empty] == -torch.inf).all())
    dq, dk, dv = torch.autograd.grad(out.sum() + lse.sum(), inputs)
    assert bool((dq[empty] == 0).all())
    assert bool(torch.isfinite(dk).all() and torch.isfinite(dv).all())


@pytest.mark.parametrize(("queries", "keys"), [(0, 16), (16, 0), (0, 0)])
def test_no_queries_or_keys(queries, keys):
    q = torch.randn(1, 2, queries, 4, requires_grad=True)
    k, v = (torch.randn(1, 1, keys, 4, requires_grad=True) for _ in range(2))
    out, lse = block_attend(q, k, v, BlockLayout.dense(queries, keys, block=8), return_lse=True)
    torch.testing.assert_close(out, torch.zeros(1, 2, queries, 4))
    torch.testing.assert_close(lse, torch.full((1, 2, queries), -torch.inf))
    for grad, like in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(like))


def test_layout_without_entries():
    inputs, mask, _ = problem("square")
    layout = BlockLayout.from_dense(torch.zeros_like(mask), 16)
    out, lse = block_attend(*inputs, layout, return_lse=True)
    assert bool((out == 0).all() and (lse == -torch.inf).all())
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["gqa shared by heads", "per batch and head"])
def test_hidden_poison_is_inert(name, poison):
    inputs, mask, _ = problem(name)
    mask[..., 5] = False
    layout = BlockLayout.from_dense(mask, SHAPES[name][7])
    clean, poisoned = [x.detach().clone() for x in inputs], [x.detach().clone() for x in inputs]
    for x in clean:
        x[..., 5, :] = 0 if x is not clean[0] else x[..., 5, :]
    for x in poisoned[1:]:
        x[..., 5, :] = poison
    poisoned[0][:, :, 3], clean[0][:, :, 3] = poison, 0.0  # an empty row
    for group in (clean, poisoned):
        for x in group:
            x.requires_grad_()
    expected = block_attend(*clean, layout, return_lse=True)
    found = block_attend(*poisoned, layout, return_lse=True)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=0, atol=0)
    torch.testing.assert_close(gradients(*found, poisoned), gradients(*expected, clean), rtol=0, atol=0)


def test_seen_poison_stays_with_those_who_see_it():
    inputs, mask, layout = problem("gqa per head")
    clean = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        inputs[1][1, 0, 9, 2] = torch.nan
        inputs[2][1, 1, 20, 1] = torch.inf
    found, expected = (block_attend(*x, layout, return_lse=True) for x in (inputs, clean))
    sees_key, sees_value = torch.zeros(2, 2, 4, 37, dtype=torch.bool)
    sees_key[1, :2], sees_value[1, 2:] = mask[0, :2, :, 9], mask[0, 2:, :, 20]
    bad = sees_key | sees_value
    assert torch.equal(found.out.isnan().all(-1), sees_key)
    assert torch.equal(found.out.isnan().any(-1), bad)
    assert torch.equal(found.out[..., 1].isnan(), bad)
    assert torch.equal(found.lse.isnan(), sees_key)
    torch.testing.assert_close(found.out[~bad], expected.out[~bad], rtol=0, atol=0)
    dq, dk, dv = torch.autograd.grad(found.out.sum(), inputs)
    assert torch.equal(dq.isnan().all(-1), bad)
    by_head = (mask.expand(2, -1, -1, -1) & bad[..., None]).any(2)
    reached = by_head.view(2, 2, 2, -1).any(2)
    assert torch.equal(dk.isnan().all(-1), reached)
    assert torch.equal(dv.isnan().all(-1), reached)


def test_poisoned_query_stays_in_its_row():
    inputs, _, layout = problem("square")
    expected = block_attend(*inputs, layout)
    with torch.no_grad():
        inputs[0][0, 1, 20] = torch.nan
    out = block_attend(*inputs, layout)
    row = torch.zeros(1, 2, 64, dtype=torch.bool)
    row[0, 1, 20] = True
    assert torch.equal(out.isnan().any(-1), row)
    torch.testing.assert_close(out[~row], expected[~row], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["gqa shared by heads", "values wider than keys"])
def test_low_precision(name, dtype):
    inputs, mask, layout = problem(name, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = oracle(*exact, mask)
    expected = (*expected, *gradients(*expected, exact))
    results = {}
    for impl in ("eager", "reference"):
        found = block_attend(*inputs, layout, return_lse=True, impl=impl)
        results[impl] = (*found, *gradients(*found, inputs))
    assert results["eager"][0].dtype == dtype
    assert results["eager"][1].dtype == torch.float32
    for ours, theirs, truth in zip(results["eager"], results["reference"], expected, strict=True):
        assert ours.dtype == theirs.dtype
        some = torch.isfinite(truth)
        error, allowed = ((x.double() - truth)[some].abs().max() for x in (ours, theirs))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * truth[some].abs().max()


@pytest.mark.quick
def test_deterministic_and_untouched():
    inputs, _, layout = problem("gqa shared by heads", dtype=torch.float32)
    before = [x.detach().clone() for x in inputs]
    first, second = (block_attend(*inputs, layout, return_lse=True) for _ in range(2))
    assert torch.equal(first.out, second.out)
    for one, other in zip(gradients(*first, inputs), gradients(*second, inputs), strict=True):
        assert torch.equal(one, other)
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


def test_strided_inputs():
    inputs, mask, layout = problem("gqa shared by heads")
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    found, expected = block_attend(*strided, layout, return_lse=True), oracle(*inputs, mask)
    torch.testing.assert_close(tuple(found), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(*found, strided), gradients(*expected, inputs), rtol=1e-9, atol=1e-11)


def test_many_patterns_are_unpacked_piece_by_piece():
    inputs, mask, layout = problem("square")
    assert len(layout.bits) > 8
    found = block_attend(*inputs, layout, return_lse=True, workspace=4096)
    torch.testing.assert_close(tuple(found), oracle(*inputs, mask), rtol=1e-10, atol=1e-12)


def operator_arguments(name, dtype):
    inputs, _, layout = problem(name, dtype=dtype)
    tensors = (layout.indptr, layout.indices, layout.kinds, layout.bits)
    return inputs, (*tensors, layout.batch, layout.heads, *layout.block, 0.3, None, 2**20, "eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    inputs, rest = operator_arguments("gqa shared by heads", dtype)
    torch.library.opcheck(torch.ops.saccade.block_attend.default, (*inputs, *rest))
    inputs = [x.detach() for x in inputs]
    out, lse = torch.ops.saccade.block_attend(*inputs, *rest)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(torch.ops.saccade.block_attend_backward.default, (*grads, *inputs, out, lse, *rest))


def test_compiles_whole():
    inputs, _, layout = problem("gqa shared by heads", dtype=torch.float32)
    sinks = torch.zeros(6)

    def run(q, k, v):
        out, lse = block_attend(q * 2, k, v, layout, sinks=sinks, softcap=3.0, return_lse=True)
        return out + 1, lse

    expected = run(*inputs)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(*found, inputs), gradients(*expected, inputs))


def test_records_what_ran():
    inputs, mask, layout = problem("square")
    with recording() as records:
        block_attend(*inputs, layout)
    assert [(r.op, r.impl) for r in records] == [("block_attend", "eager")]
    assert records[0].density == pytest.approx(float(mask.double().mean()))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 4)}, r"q of shape \(3, 4\): expected 4 dimensions"),
        ({"k": torch.zeros(2, 6, 41, 7, dtype=torch.float64)}, r"k of shape \(2, 6, 41, 7\): expected batch 2"),
        ({"layout": torch.zeros(2)}, "layout of type Tensor: expected a BlockLayout"),
        ({"batch": 3}, "layout.batch=3: expected 1 or 2"),
        ({"heads": 4}, "layout.heads=4: expected 1 or 6"),
        ({"queries": 36}, "layout.queries=36: expected 37"),
        ({"keys": 48}, "layout.keys=48: expected 41"),
        ({"softcap": 0.0}, "softcap=0.0: expected a number above 0"),
        ({"softcap": float("nan")}, "softcap=nan: expected a number above 0"),
        ({"sinks": torch.zeros(2)}, r"sinks of shape \(2,\) and dtype torch.float32: expected floats \[6\]"),
        ({"sinks": torch.zeros(6).int()}, "dtype torch.int32: expected floats"),
        ({"sinks": torch.zeros(6, device="meta")}, "sinks on meta: expected cpu"),
        ({"workspace": 0}, "workspace=0: expected a number of bytes above 0"),
        ({"impl": "fast"}, "impl='fast': block_attend has 'auto'"),
        ({"device": "meta"}, "layout on meta: expected cpu"),
    ],
)
def test_refuses(change, message):
    (q, k, v), _, layout = problem("gqa shared by heads")
    call = {"q": q, "k": k, "v": v, "layout": layout}
    for field, value in change.items():
        if field in ("batch", "heads", "queries", "keys"):
            call["layout"] = dataclasses.replace(layout, **{field: value})
        elif field == "device":
            call["layout"] = layout.to(value)
        else:
            call[field] = value
    with pytest.raises(ValueError, match=message):
        block_attend(**call)
