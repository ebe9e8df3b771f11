"""`gather_attend` against an oracle that walks through the lists one by one, and the promises of its docstring."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops import attend, gather_attend, recording
from saccade.types import TokenIndex

INF = float("inf")
native = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")
FP64 = torch.float64


def draw(*shape: int, seed: int, dtype: torch.dtype = FP64, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)
    return values.to(dtype).requires_grad_(grad)


def problem(
    batch: int = 2, heads: int = 4, groups: int = 2, queries: int = 7, keys: int = 9, dtype: torch.dtype = FP64,
    grad: bool = False,
) -> list[Tensor]:  # fmt: skip
    shapes = ((batch, heads, queries, 4), (batch, groups, keys, 4), (batch, groups, keys, 3))
    return [draw(*shape, seed=seed, dtype=dtype, grad=grad) for seed, shape in enumerate(shapes)]


def lists(
    batch: int = 2, heads: int = 4, queries: int = 7, keys: int = 9, group: int = 1, length: int = 4,
    causal: bool = False, seed: int = 3,
) -> TokenIndex:  # fmt: skip
    """Random lists with empty slots, one of them wholly empty."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, heads, -(-queries // group), keys, generator=generator).argsort(-1)[..., :length]
    order = torch.where(torch.rand(order.shape, generator=generator) < 0.2, -1, order)
    order[0, 0, 0] = -1
    return TokenIndex(order, queries, keys, group, causal)


def oracle(q, k, v, index, softcap=None, sinks=None, scale=0.5):  # noqa: ANN001, ANN201
    """One query at a time, differentiable; reads only what is listed."""
    batch, heads, queries, _ = q.shape
    share, outs, lses = heads // k.shape[1], [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                chosen = index.indices[
                    b % len(index.indices), h * index.indices.shape[1] // heads, i // index.group
                ].tolist()
                last = i + index.keys - queries if index.causal else index.keys
                js = [j for j in chosen if 0 <= j <= last]
                logits = [(q[b, h, i] * k[b, h // share, j]).sum() * scale for j in js]
                logits = logits if softcap is None else [softcap * torch.tanh(x / softcap) for x in logits]
                extra = [] if sinks is None else [sinks[h]]
                out, lse = v.new_zeros(v.shape[3]), v.new_tensor(-INF)
                if logits + extra:
                    lse = torch.logsumexp(torch.stack(logits + extra), 0)
                for x, j in zip(logits, js, strict=True):
                    out = out + torch.exp(x - lse) * v[b, h // share, j]
                outs.append(out)
                lses.append(lse)
    return torch.stack(outs).view(batch, heads, queries, -1), torch.stack(lses).view(batch, heads, queries)


INDICES = {
    "per head": lists(),
    "shared": lists(batch=1, heads=1),
    "shared heads": lists(heads=1, causal=True),
    "shared batch": lists(batch=1, group=3),
    "groups": lists(group=2, causal=True),
    "shared groups": lists(batch=1, heads=1, group=3, causal=True),
    "one group": lists(group=9, length=9, causal=True),
    "no slots": lists(length=0),
    "per key/value head": lists(heads=2, group=2, causal=True),
}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("workspace", [1, 2**20])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_outputs_and_gradients_agree_with_the_oracle(index, extras, workspace, impl):
    leaves = problem(grad=True)
    rules = {"softcap": 1.5, "sinks": draw(4, seed=8, grad=True)} if extras else {}
    leaves += [rules["sinks"]] if extras else []
    result = gather_attend(*leaves[:3], index, **rules, return_lse=True, workspace=workspace, impl=impl)
    expected = oracle(*leaves[:3], index, **rules)
    weights = [draw(*x.shape, seed=20 + i) for i, x in enumerate(expected)]
    gradients = []
    for out, lse in (result, expected):
        loss = (out * weights[0]).sum() + (torch.where(lse == -INF, 0.0, lse) * weights[1]).sum()
        loss = loss + 0 * sum(x.sum() for x in leaves)
        gradients.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(tuple(result), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


@native
@pytest.mark.quick
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(
    "index", [x for x in INDICES.values() if x.indices.numel()], ids=[n for n in INDICES if n != "no slots"]
)
def test_the_engine_agrees_with_the_oracle(index, extras):
    leaves = [x.detach().float().requires_grad_() for x in problem()]
    rules = {"softcap": 1.5, "sinks": draw(4, seed=8)} if extras else {}
    with recording() as records:
        result = gather_attend(*leaves, index, **rules, scale=0.5, return_lse=True)
    assert records[0].impl == "cpu"
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = oracle(*exact, index, **rules)
    torch.testing.assert_close(tuple(result), expected, rtol=0, atol=2e-6, check_dtype=False)
    gradients = [torch.autograd.grad(out.square().sum(), of) for (out, _), of in ((result, leaves), (expected, exact))]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5, check_dtype=False)


@native
@pytest.mark.quick
def test_the_engine_refuses_lists_that_point_outside():
    q, k, v = problem(dtype=torch.float32)
    outside = lists().indices.masked_fill(lists().indices == 3, 9)
    with pytest.raises(ValueError, match=r"index.indices in \[-1, 9\]: expected -1 or positions in \[0, 9\)"):
        gather_attend(q, k, v, TokenIndex(outside, 7, 9), impl="cpu")
    with pytest.raises(ValueError, match=r"impl='cpu': gather_attend cannot run it here: .* q is fp64"):
        gather_attend(*problem(), lists(), impl="cpu")


@pytest.mark.quick
@pytest.mark.parametrize(("queries", "keys"), [(1, 6), (9, 4), (5, 5), (3, 0), (0, 3)])
def test_any_sizes(queries, keys):
    q, k, v = problem(queries=queries, keys=keys)
    indices = torch.full((1, 1, -(-queries // 2), 2), -1) if keys == 0 else None
    index = TokenIndex(indices, queries, keys, 2) if indices is not None else None
    if queries == 0:
        assert gather_attend(q, k, v, TokenIndex(torch.zeros(1, 1, 0, 2, dtype=torch.int64), 0, 3)).shape == (
            2,
            4,
            0,
            3,
        )
        return
    index = lists(queries=queries, keys=keys, group=2, causal=True, length=3) if index is None else index
    torch.testing.assert_close(tuple(gather_attend(q, k, v, index, return_lse=True)), oracle(q, k, v, index))


def test_gradcheck():
    leaves = [*problem(1, 2, 1, 3, 4, grad=True), draw(2, seed=5, grad=True)]
    index = lists(1, 1, 3, 4, group=2, length=3, causal=True)

    def call(q, k, v, sinks):
        return tuple(gather_attend(q, k, v, index, softcap=1.0, sinks=sinks, return_lse=True))

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.quick
def test_hand_made_case():
    q, k = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 2)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 4, 1)
    index = TokenIndex(torch.tensor([[[[3, 1, -1], [2, -1, -1]]]]), 2, 4)
    result = gather_attend(q, k, v, index, return_lse=True)
    torch.testing.assert_close(result.out.flatten(), torch.tensor([5.0, 4.0]))
    torch.testing.assert_close(result.lse.flatten(), torch.tensor([math.log(2), 0.0]))


@pytest.mark.quick
@pytest.mark.parametrize("causal", [False, True])
def test_all_keys_listed_is_dense_attention(causal):
    q, k, v = problem()
    index = TokenIndex(torch.arange(9).flip(0).view(1, 1, 1, 9), 7, 9, 7, causal)
    torch.testing.assert_close(gather_attend(q, k, v, index), attend(q, k, v, causal=causal))


def test_empty_lists_are_zero_with_zero_gradients():
    leaves = problem(grad=True)
    result = gather_attend(*leaves, lists(), return_lse=True)
    assert bool((result.out[0, 0, 0] == 0).all())
    assert float(result.lse.detach()[0, 0, 0]) == -INF
    dq = torch.autograd.grad(result.out.sum(), leaves)[0]
    assert bool((dq[0, 0, 0] == 0).all())


@pytest.mark.quick
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("heads", [1, 4])
def test_unlisted_poison_is_inert(value, heads):
    index = lists(heads=heads, keys=9, group=2)
    index = TokenIndex(torch.where((index.indices == 0) | (index.indices == 5), -1, index.indices), 7, 9, 2)
    clean, poisoned = problem(grad=True), problem()
    for x in poisoned[1:]:
        x[:, 0, 0], x[1, :, 5] = value, value
        x[0, 0, 0, 1] = value
    results, gradients = [], []
    for leaves in (clean, [x.requires_grad_() for x in poisoned]):
        result = gather_attend(*leaves, index, return_lse=True)
        results.append(tuple(result))
        finite = torch.where(result.lse == -INF, 0.0, result.lse)
        gradients.append(torch.autograd.grad(result.out.sum() + finite.sum(), leaves))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 4])
def test_listed_poison_is_seen_by_exactly_those_rows(heads):
    index = lists(heads=heads, group=2, causal=True)
    q, k, v = problem()
    clean = gather_attend(q, k, v, index)
    k[0, 1, 3], v[1, 0, 4] = math.nan, INF
    out = gather_attend(q, k, v, index)
    sees = index.to_dense().expand(2, 4, 7, 9)
    bad = torch.zeros(2, 4, 7, dtype=torch.bool)
    bad[0, 2:], bad[1, :2] = sees[0, 2:, :, 3], sees[1, :2, :, 4]
    assert bool(bad.any())
    assert torch.equal(~out.isfinite().all(-1), bad)
    torch.testing.assert_close(out[~bad], clean[~bad], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_error_is_within_twice_the_references(dtype):
    low, index = problem(queries=33, keys=40, dtype=dtype), lists(queries=33, keys=40, length=12)
    grad = draw(2, 4, 33, 3, seed=5, dtype=dtype)

    def run(leaves: list[Tensor], impl: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = gather_attend(*leaves, index, impl=impl)
        assert out.dtype == leaves[0].dtype
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    exact = run([x.double() for x in low], "reference")
    for found, same, truth in zip(run(low, "auto"), run(low, "reference"), exact, strict=True):
        allowed = 2 * (same.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (found.double() - truth).abs().max() <= allowed


def test_backward_is_deterministic():
    grads = []
    for _ in range(2):
        leaves = problem(dtype=torch.float32, grad=True)
        grads.append(torch.autograd.grad(gather_attend(*leaves, lists(), workspace=2000).sum(), leaves))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_record():
    index = lists(group=2, causal=True)
    with recording() as records:
        gather_attend(*problem(), index)
    assert (records[0].op, records[0].impl) == ("gather_attend", "eager")
    assert records[0].density == pytest.approx(float(index.to_dense().double().mean()))


class TestOperator:
    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("impl", ["eager", pytest.param("cpu", marks=native)])
    def test_opcheck(self, impl, full):
        q, k, v = problem(1, 2, 1, 3, 4, dtype=torch.float32, grad=True)
        index = lists(1, 2, 3, 4, group=2, length=2)
        sinks = torch.zeros(2, requires_grad=True) if full else None
        call = (q, k, v, index.indices, sinks, 2, full, 1.0 if full else None, 0.5, 2**20, impl)
        torch.library.opcheck(torch.ops.saccade.gather_attend.default, call)

    def test_compiles_whole(self):
        leaves, index = problem(grad=True), lists(group=2, causal=True)
        compiled = torch.compile(lambda q, k, v: gather_attend(q, k, v, index), fullgraph=True, backend="aot_eager")
        results = [compiled(*leaves), gather_attend(*leaves, index)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), leaves) for out in results))

    def test_offsets_beyond_int32(self):
        q = torch.empty(1, 64, 2**20, 64, device="meta", dtype=torch.bfloat16)
        indices = torch.empty(1, 1, 2**20, 64, device="meta", dtype=torch.int64)
        out = gather_attend(q, q, q, TokenIndex(indices, 2**20, 2**20))
        assert out.numel() == 2**32


@pytest.mark.quick
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"v": torch.zeros(2, 2, 8, 3)}, r"v of shape \(2, 2, 8, 3\): expected \(2, 2, 9\)"),
        ({"index": torch.zeros(1)}, r"index of type Tensor: expected a TokenIndex"),
        ({"index": lists(queries=6)}, r"index for 6 queries and 9 keys: expected 7 and 9"),
        (
            {"index": lists(batch=3)},
            r"index.indices of shape \(3, 4, 7, 4\): expected batch 2 or 1 and heads 4, 2 or 1",
        ),
        (
            {"index": lists(heads=3)},
            r"index.indices of shape \(2, 3, 7, 4\): expected batch 2 or 1 and heads 4, 2 or 1",
        ),
        ({"index": TokenIndex(torch.full((1, 1, 7, 1), 9), 7, 9)}, r"index.indices in \[9, 9\]: expected -1 or"),
        (
            {"index": TokenIndex(torch.zeros(1, 1, 7, 1, dtype=torch.int64, device="meta"), 7, 9)},
            r"index.indices on meta: expected cpu",
        ),
        ({"softcap": -1.0}, r"softcap=-1.0: expected a finite number above 0"),
        ({"sinks": torch.zeros(2)}, r"sinks of shape \(2,\): expected \[4\]"),
        ({"scale": math.nan}, r"scale=nan: expected a finite number"),
        ({"workspace": 0}, r"workspace=0: expected at least 1 byte"),
        ({"impl": "fast"}, r"impl='fast': gather_attend has 'auto', 'cpu', 'eager', 'reference'"),
    ],
)
def test_bad_calls_are_refused(bad, message):
    q, k, v = problem()
    call = {"q": q, "k": k, "v": v, "index": lists()} | bad
    with pytest.raises(ValueError, match=message):
        gather_attend(**call)
