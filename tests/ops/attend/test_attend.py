"""`attend` against an oracle that walks through the pairs one by one, and the promises of its docstring."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.ops import attend, recording

INF = float("inf")
FP64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int, dtype: torch.dtype = FP64, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=FP64).to(dtype).requires_grad_(grad)


def problem(
    batch: int = 2, heads: int = 4, groups: int = 2, queries: int = 7, keys: int = 9, dim: int = 4, values: int = 4,
    dtype: torch.dtype = FP64, grad: bool = False,
) -> list[Tensor]:  # fmt: skip
    shapes = ((batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, values))
    return [draw(*shape, seed=seed, dtype=dtype, grad=grad) for seed, shape in enumerate(shapes)]


def visible(i: int, j: int, queries: int, keys: int, *, causal: bool, window: tuple[int, int] | None) -> bool:
    place = i + keys - queries
    if causal and j > place:
        return False
    left, right = window if window is not None else (-1, -1)
    return not (0 <= left < place - j or 0 <= right < j - place)


def oracle(
    q,
    k,
    v,
    causal=False,
    window=None,
    bias=None,
    softcap=None,
    sinks=None,
    segments=None,
    scale=None,
    mod=None,
    alibi=None,
):  # noqa: ANN001, ANN201
    """One softmax at a time, differentiable; reads only the keys and values a query sees."""
    batch, heads, queries, dim = q.shape
    keys, share = k.shape[2], heads // k.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    bias = None if bias is None else bias.expand(batch, heads, queries, keys)
    outs, lses = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                js = [j for j in range(keys) if visible(i, j, queries, keys, causal=causal, window=window)]
                if segments is not None:
                    ids, others = (x[b % len(x)] for x in segments)
                    js = [j for j in js if ids[i] == others[j] and ids[i] >= 0]
                if bias is not None:
                    js = [j for j in js if bias[b, h, i, j] > -INF]
                logits = [(q[b, h, i] * k[b, h // share, j]).sum() * scale for j in js]
                if softcap is not None:
                    logits = [softcap * torch.tanh(x / softcap) for x in logits]
                if alibi is not None:
                    logits = [x - alibi[h] * abs(i + keys - queries - j) for x, j in zip(logits, js, strict=True)]
                if bias is not None:
                    logits = [x + bias[b, h, i, j] for x, j in zip(logits, js, strict=True)]
                if mod is not None:
                    logits = [mod(x, b, h, i, j) for x, j in zip(logits, js, strict=True)]
                extra = [] if sinks is None else [sinks[h]]
                if not logits + extra:
                    outs.append(v.new_zeros(v.shape[3]))
                    lses.append(v.new_tensor(-INF))
                    continue
                lse = torch.logsumexp(torch.stack(logits + extra), 0)
                out = v.new_zeros(v.shape[3])
                for x, j in zip(logits, js, strict=True):
                    out = out + torch.exp(x - lse) * v[b, h // share, j]
                outs.append(out)
                lses.append(lse)
    return torch.stack(outs).view(batch, heads, queries, -1), torch.stack(lses).view(batch, heads, queries)


SEGMENTS = (
    torch.tensor([[0, 0, 1, 1, 1, -1, 2]]),
    torch.tensor([[0, 0, 0, 1, 1, 1, 3, -1, -1], [1, 1, 2, 2, 0, 0, 0, 0, 5]]),
)
HIDING = torch.tensor([0.3, -INF, 0.1, -0.4, 0.0, 2.0, -INF, 0.0, -1.0], dtype=FP64)
SLOPES = torch.tensor([0.5, 0.25, 1.0, -0.125], dtype=FP64)
RULES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "left": {"window": (3, -1)},
    "right": {"window": (-1, 0)},
    "causal window": {"causal": True, "window": (2, 5)},
    "bias": {"bias": draw(2, 1, 7, 9, seed=7)},
    "hiding bias": {"bias": HIDING},
    "hidden rows": {"bias": torch.tensor([[0.0], [-INF]] * 3 + [[-INF]], dtype=FP64), "causal": True},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": draw(4, seed=8)},
    "segments": {"segments": SEGMENTS},
    "scale": {"scale": 0.3},
    "alibi": {"alibi": SLOPES},
    "alibi, causal": {"alibi": SLOPES.float(), "causal": True, "window": (3, 0)},
    "alibi, bias": {"alibi": SLOPES, "bias": HIDING, "softcap": 1.5},
    "alibi, score_mod": {"alibi": SLOPES, "window": (4, 2), "mod": lambda score, b, h, i, j: score * (1 + b)},
    "all": {
        "causal": True, "window": (4, 0), "bias": draw(1, 4, 7, 1, seed=9), "softcap": 2.0, "sinks": draw(4, seed=8),
        "segments": SEGMENTS, "scale": 0.7, "alibi": SLOPES,
    },
    "score_mod": {"causal": True, "mod": lambda score, b, h, i, j: score + 0.125 * (i - j) * (h + 1) + b},
}  # fmt: skip


def arguments(rules: dict) -> dict:
    renamed = {name: value for name, value in rules.items() if name not in ("segments", "mod")}
    if "segments" in rules:
        renamed |= dict(zip(("q_segments", "kv_segments"), rules["segments"], strict=True))
    return renamed | ({"score_mod": rules["mod"]} if "mod" in rules else {})


@pytest.mark.parametrize("impl", ["auto", "eager", "reference"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_outputs_and_gradients_agree_with_the_oracle(rules, impl):
    leaves = problem(grad=True)
    rules = {name: x.clone().requires_grad_() if name in ("bias", "sinks") else x for name, x in rules.items()}
    leaves += [x for name, x in rules.items() if name in ("bias", "sinks")]
    results = attend(*leaves[:3], **arguments(rules), return_lse=True, impl=impl, workspace=1000)
    expected = oracle(*leaves[:3], **rules)
    weights = [draw(*x.shape, seed=20 + i) for i, x in enumerate(expected)]
    gradients = []
    for out, lse in (results, expected):
        loss = (out * weights[0]).sum() + (torch.where(lse == -INF, 0.0, lse) * weights[1]).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(results, type(results)(*expected), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


@pytest.mark.quick
@pytest.mark.parametrize(("queries", "keys"), [(1, 6), (3, 8), (8, 3), (5, 5), (2, 0), (0, 4)])
@pytest.mark.parametrize("values", [2, 4, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_any_sizes(queries, keys, values, causal):
    q, k, v = problem(queries=queries, keys=keys, values=values)
    if queries == 0:
        assert attend(q, k, v, causal=causal).shape == (2, 4, 0, values)
        return
    out, lse = oracle(q, k, v, causal=causal)
    for impl in ("auto", "eager"):
        result = attend(q, k, v, causal=causal, return_lse=True, impl=impl)
        torch.testing.assert_close(result.out, out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(result.lse, lse, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", [(7, 9), (9, 7)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_sdpa_gradients_without_an_lse_gradient(sizes, with_sinks):
    leaves = problem(queries=sizes[0], keys=sizes[1], values=3, grad=True)
    sinks = draw(4, seed=8, grad=True) if with_sinks else None
    leaves += [] if sinks is None else [sinks]
    grad = draw(2, 4, sizes[0], 3, seed=5)
    found = torch.autograd.grad(attend(*leaves[:3], causal=True, sinks=sinks, impl="sdpa"), leaves, grad)
    expected = torch.autograd.grad(oracle(*leaves[:3], causal=True, sinks=sinks)[0], leaves, grad)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gradcheck_with_everything():
    leaves = [*problem(1, 2, 1, 3, 4, 2, 3, grad=True), draw(2, 3, 1, seed=4, grad=True), draw(2, seed=5, grad=True)]

    def call(q, k, v, bias, sinks):
        return tuple(attend(q, k, v, causal=True, window=(2, 0), bias=bias, sinks=sinks, softcap=1.0, return_lse=True))

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.quick
def test_hand_made_case():
    zeros = torch.zeros(1, 1, 3, 2)
    v = torch.tensor([[[[1.0], [3.0], [8.0]]]])
    result = attend(zeros, zeros, v, causal=True, return_lse=True)
    torch.testing.assert_close(result.out.flatten(), torch.tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close(result.lse.flatten(), torch.tensor([1.0, 2.0, 3.0]).log())


@pytest.mark.quick
@pytest.mark.parametrize("impl", ["auto", "eager", "reference"])
def test_empty_rows_are_zero_with_zero_gradients(impl):
    leaves = problem(queries=9, keys=4, grad=True)
    result = attend(*leaves, causal=True, return_lse=True, impl=impl)
    assert bool((result.out[:, :, :5] == 0).all())
    assert bool((result.lse[:, :, :5] == -INF).all())
    dq = torch.autograd.grad((result.out.sum(), result.lse[:, :, 5:].sum()), leaves)[0]
    assert bool((dq[:, :, :5] == 0).all())
    assert bool(dq.isfinite().all())


@pytest.mark.quick
@pytest.mark.parametrize("impl", ["auto", "eager", "reference"])
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("mod", [None, lambda score, b, h, i, j: score])
def test_hidden_poison_is_inert(impl, value, mod):
    segments = {
        "q_segments": torch.tensor([[0, 0, 0, 1, 1, 1, -1]]),
        "kv_segments": torch.tensor([[0] * 4 + [1] * 3 + [2, -1]]),
    }
    clean, poisoned = problem(grad=True), problem()
    for x in poisoned[1:]:
        x[0, :, 7:] = value
        x[1, 1, 8] = value
    poisoned[0][:, :, 6] = value  # a padded query
    poisoned = [x.requires_grad_() for x in poisoned]
    results, gradients = [], []
    for leaves in (clean, poisoned):
        result = attend(*leaves, **segments, score_mod=mod, return_lse=True, impl=impl)
        results.append(result)
        gradients.append(torch.autograd.grad(result.out.sum() + result.lse[:, :, :6].square().sum(), leaves))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
    dq, dk, dv = gradients[1]
    assert bool(dk.isfinite().all() and dv.isfinite().all() and dq[:, :, :6].isfinite().all())
    torch.testing.assert_close(gradients[0][1:], gradients[1][1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "eager", "reference"])
@pytest.mark.parametrize("mod", [None, lambda score, b, h, i, j: score])
def test_seen_poison_is_seen_by_exactly_those_rows(impl, mod):
    q, k, v = problem(queries=6, keys=6)
    clean = attend(q, k, v, causal=True)
    k[0, 1, 3], v[1, 0, 4] = math.nan, INF
    out, lse = attend(q, k, v, causal=True, score_mod=mod, return_lse=True, impl=impl)
    bad = torch.zeros(2, 4, 6, dtype=torch.bool)
    bad[0, 2:, 3:] = True
    bad[1, :2, 4:] = True
    assert torch.equal(~out.isfinite().all(-1), bad)
    torch.testing.assert_close(out[~bad], clean[~bad], rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_poison_far_away_is_seen_however_steep_the_slopes(impl):
    """Its weight is below the smallest number, and yet the row sees it."""
    q, k, v = problem(queries=6, keys=6)
    v[:, :, 0] = math.nan
    out = attend(q, k, v, causal=True, alibi=torch.full((4,), 1e4), impl=impl)
    assert bool(out.isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("impl", ["auto", "eager"])
@pytest.mark.parametrize("rules", [{"causal": True}, {"window": (8, 0), "softcap": 3.0}], ids=["causal", "window"])
def test_low_precision_error_is_within_twice_the_references(dtype, impl, rules):
    grad = draw(1, 4, 33, 16, seed=5, dtype=dtype)
    low = problem(1, 4, 2, 33, 40, 16, 16, dtype=dtype)

    def run(leaves: list[Tensor], impl: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = attend(*leaves, **rules, impl=impl)
        assert out.dtype == leaves[0].dtype
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    exact = run([x.double() for x in low], "reference")
    for found, same, truth in zip(run(low, impl), run(low, "reference"), exact, strict=True):
        allowed = 2 * (same.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (found.double() - truth).abs().max() <= allowed


def test_lse_dtype():
    assert attend(*problem(dtype=torch.bfloat16), return_lse=True).lse.dtype == torch.float32
    assert attend(*problem(), return_lse=True).lse.dtype == FP64


@pytest.mark.quick
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_chunks_equal_whole(rules):
    q, k, v = problem()
    whole = attend(q, k, v, **arguments(rules), impl="eager", return_lse=True)
    small = attend(q, k, v, **arguments(rules), impl="eager", return_lse=True, workspace=1)
    torch.testing.assert_close(small, whole, rtol=1e-12, atol=1e-12)


def test_step_by_step_equals_whole():
    q, k, v = problem(queries=8, keys=8)
    whole = attend(q, k, v, causal=True)
    steps = [attend(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], causal=True) for i in range(8)]
    torch.testing.assert_close(torch.cat(steps, 2), whole, rtol=1e-12, atol=1e-12)
    pieces = [attend(q[:, :, i : i + 4], k[:, :, : i + 4], v[:, :, : i + 4], causal=True) for i in (0, 4)]
    torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=1e-12, atol=1e-12)


def test_non_contiguous_inputs():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in problem())
    for impl in ("auto", "eager"):
        torch.testing.assert_close(
            attend(q, k, v, causal=True, impl=impl), attend(*problem(), causal=True, impl="reference")
        )


def test_autocast_does_not_touch_the_accumulation():
    q, k, v = problem(dtype=torch.float32)
    plain = attend(q, k, v, impl="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(attend(q, k, v, impl="eager"), plain, rtol=0, atol=0)


class TestNormalise:
    @staticmethod
    def relu(scores: Tensor, mask: Tensor) -> Tensor:
        positive = scores.relu() * mask
        return positive / (1 + positive.sum(-1, keepdim=True))

    def test_gets_whole_finite_rows(self):
        q, k, v = problem()
        k.requires_grad_()
        seen: list[tuple[int, int]] = []

        def normalise(scores, mask):
            assert scores.shape[:2] == (2, 4)
            assert bool(scores.isfinite().all())
            assert mask.dtype == torch.bool
            seen.append(tuple(scores.shape[2:]))
            return self.relu(scores, mask)

        out = attend(q, k, v, causal=True, window=(3, 0), normalise=normalise, workspace=1)
        assert seen == [(1, n) for n in range(3, 10)]
        scores = torch.einsum("bhmd,bhnd->bhmn", q, k.repeat_interleave(2, 1)) / 2
        mask = torch.tensor([[visible(i, j, 7, 9, causal=True, window=(3, 0)) for j in range(9)] for i in range(7)])
        expected = self.relu(scores, mask) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), k)[0] for x in (out, expected)))

    def test_reference_agrees(self):
        q, k, v = problem()
        results = [attend(q, k, v, causal=True, normalise=self.relu, impl=impl) for impl in ("eager", "reference")]
        torch.testing.assert_close(*results)


class TestDropout:
    def test_keeps_the_mean_and_the_right_fraction(self):
        torch.manual_seed(0)
        q, k = torch.zeros(1, 1, 400, 2), torch.zeros(1, 1, 50, 2)
        out = attend(q, k, torch.eye(50)[None, None], dropout=0.25, workspace=2**16)
        assert abs(float((out == 0).double().mean()) - 0.25) < 0.02
        torch.testing.assert_close(out[out > 0], torch.full_like(out[out > 0], 1 / 50 / 0.75))

    def test_backward_sees_the_forwards_mask(self):
        torch.manual_seed(0)
        q, k = torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 50, 2)
        v = torch.eye(50)[None, None].requires_grad_()
        out = attend(q, k, v, dropout=0.5, workspace=1)
        (dv,) = torch.autograd.grad(out.sum(), v)
        torch.testing.assert_close(dv[0, 0, :, 0], out.detach()[0, 0].sum(0))


def test_score_mod_gradient_reaches_its_closure():
    q, k, v = problem()
    slope = torch.tensor(0.3, dtype=FP64, requires_grad=True)
    grads = []
    for workspace in (1, 2**20):
        out = attend(q, k, v, score_mod=lambda score, b, h, i, j: score + slope * (i - j), workspace=workspace)
        grads += torch.autograd.grad(out.square().sum(), slope)
    expected = oracle(q, k, v, mod=lambda score, b, h, i, j: score + slope * (i - j))[0]
    grads += torch.autograd.grad(expected.square().sum(), slope)
    torch.testing.assert_close(grads[0], grads[2])
    torch.testing.assert_close(grads[1], grads[2])


@pytest.mark.quick
class TestRecords:
    @pytest.mark.parametrize(
        ("rules", "density"),
        [
            ({}, 1.0),
            ({"causal": True}, 42 / 63),
            ({"window": (1, 1)}, 20 / 63),
            ({"causal": True, "window": (2, 9)}, 21 / 63),
        ],
    )
    def test_density(self, rules, density):
        with recording() as records:
            attend(*problem(), **rules)
        assert [entry.op for entry in records] == ["attend"]
        assert records[0].density == pytest.approx(density)

    def test_density_of_segments(self):
        with recording() as records:
            attend(*problem(), **arguments({"segments": SEGMENTS, "causal": True}))
        expected = sum(
            visible(i, j, 7, 9, causal=True, window=None)
            and bool(SEGMENTS[0][0, i] == SEGMENTS[1][b, j] and SEGMENTS[0][0, i] >= 0)
            for b in range(2) for i in range(7) for j in range(9)
        )  # fmt: skip
        assert records[0].density == pytest.approx(expected / (2 * 63))

    @pytest.mark.parametrize(
        ("rules", "reason"),
        [
            ({"softcap": 1.0}, "softcap"),
            ({"alibi": SLOPES}, "alibi"),
            ({"window": (1, 1)}, "window"),
            ({"dropout": 0.1}, "dropout"),
            ({"bias": torch.zeros(9)}, "float32"),
            ({"bias": torch.zeros(9, dtype=FP64), "causal": True}, "leave empty"),
            ({"bias": torch.zeros(9, dtype=FP64, requires_grad=True)}, "gradient of bias"),
        ],
    )
    def test_says_why_sdpa_was_refused(self, rules, reason):
        with recording() as records:
            attend(*problem(), **rules)
        assert records[0].impl == "eager"
        assert reason in records[0].refused["sdpa"]

    def test_sdpa_serves_chunked_prefill_and_decoding(self):
        with recording() as records:
            attend(*problem(), causal=True)
            attend(*problem(queries=1), causal=True, window=(20, 0))
        assert [entry.impl for entry in records] == ["sdpa", "sdpa"]
        assert list(records[0].refused) == ["cpu"]


class TestOperator:
    @pytest.mark.parametrize("strided", [False, True])
    @pytest.mark.parametrize("full", [False, True])
    def test_opcheck(self, full, strided):
        q, k, v = problem(1, 2, 1, 3, 4, 2, 3, dtype=torch.float32, grad=True)
        if strided:
            q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
        bias, sinks = torch.zeros(1, 2, 1, 4, requires_grad=True), torch.zeros(2, requires_grad=True)
        ids = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)
        slopes = torch.tensor([0.5, 0.25])
        rest = (
            (bias, sinks, *ids, slopes, 2, 0, 1.0, 0.5, 2**20, "eager")
            if full
            else (None,) * 5 + (-1, 0, None, 0.5, 1, "sdpa")
        )
        torch.library.opcheck(torch.ops.saccade.attend.default, (q, k, v, *rest))

    @pytest.mark.parametrize(
        "rules",
        [
            {"causal": True},
            {"alibi": SLOPES, "causal": True},
            {"window": (2, 0), "softcap": 1.0, "sinks": torch.zeros(4, dtype=FP64)},
            {"score_mod": lambda score, b, h, i, j: score + i - j},
            {"normalise": lambda scores, mask: scores.relu() * mask},
        ],
        ids=["sdpa", "alibi", "eager", "score_mod", "normalise"],
    )
    def test_compiles_whole(self, rules):
        leaves = problem(grad=True)
        compiled = torch.compile(lambda q, k, v: attend(q, k, v, **rules), fullgraph=True, backend="aot_eager")
        results = [call(*leaves) for call in (compiled, lambda *x: attend(*x, **rules))]
        torch.testing.assert_close(*results)
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in results]
        torch.testing.assert_close(*grads)

    def test_offsets_beyond_int32(self):
        q = torch.empty(1, 64, 2**20, 64, device="meta", dtype=torch.bfloat16)
        out, lse = torch.ops.saccade.attend(q, q, q, None, None, None, None, None, 127, 0, None, 0.125, 2**20, "eager")
        assert out.numel() == 2**32
        assert lse.shape == (1, 64, 2**20)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": torch.zeros(2, 4, 7)}, r"q of shape \(2, 4, 7\): expected 4 dimensions"),
        ({"window": (-2, 0)}, r"window=\(-2, 0\): expected \(left, right\)"),
        ({"window": 3}, r"window=3: expected \(left, right\)"),
        ({"window": (1.5, 0)}, r"window=\(1.5, 0\): expected"),
        ({"bias": torch.zeros(7, 8)}, r"bias of shape \(7, 8\): expected one that broadcasts to \(2, 4, 7, 9\)"),
        ({"bias": torch.zeros(1, 2, 4, 7, 9)}, r"bias of shape \(1, 2, 4, 7, 9\)"),
        ({"bias": torch.ones(7, 9, dtype=torch.bool)}, r"bias of dtype torch.bool: expected floating point"),
        ({"bias": torch.zeros(7, 9, device="meta")}, r"bias on meta: expected cpu"),
        ({"softcap": 0.0}, r"softcap=0.0: expected a finite number above 0"),
        ({"softcap": math.nan}, r"softcap=nan"),
        ({"sinks": torch.zeros(3)}, r"sinks of shape \(3,\): expected \[4\]"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, r"sinks is torch.int64 on cpu"),
        ({"alibi": 0.5}, r"alibi of shape float: expected \[4\], one slope per query head"),
        ({"alibi": torch.zeros(2)}, r"alibi of shape \(2,\): expected \[4\]"),
        ({"alibi": torch.zeros(4, dtype=torch.int64)}, r"alibi is torch.int64 on cpu: expected floating point on cpu"),
        ({"alibi": torch.zeros(4, device="meta")}, r"alibi is torch.float32 on meta: expected floating point on cpu"),
        ({"alibi": torch.zeros(4, requires_grad=True)}, r"alibi.requires_grad=True: expected constant slopes"),
        ({"alibi": torch.zeros(4), "impl": "sdpa"}, r"impl='sdpa': attend cannot run it here: alibi"),
        ({"scale": INF}, r"scale=inf: expected a finite number"),
        ({"dropout": 1.0}, r"dropout=1.0: expected a fraction in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1"),
        ({"workspace": 0}, r"workspace=0: expected at least 1 byte"),
        ({"score_mod": 3}, r"score_mod of type int: expected a function"),
        ({"normalise": len, "score_mod": len}, r"score_mod and normalise: expected at most one"),
        ({"normalise": len, "sinks": torch.zeros(4)}, r"sinks and normalise: expected at most one"),
        ({"normalise": len, "return_lse": True}, r"return_lse=True: expected False with normalise"),
        ({"q_segments": torch.zeros(1, 7, dtype=torch.int64)}, r"q_segments and kv_segments: expected both"),
        ({"impl": "fast"}, r"impl='fast': attend has 'auto', 'cpu', 'sdpa', 'eager', 'reference'"),
        ({"impl": "sdpa", "softcap": 1.0}, r"impl='sdpa': attend cannot run it here: softcap"),
        ({"impl": "reference", "dropout": 0.1}, r"impl='reference': attend cannot run it here: dropout"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(bad, message):
    q, k, v = problem()
    call = {"q": q, "k": k, "v": v} | bad
    with pytest.raises(ValueError, match=message):
        attend(**call)


LAWFUL = {
    "sdpa": {"causal": True},
    "eager": {"causal": True, "softcap": 2.0},
    "window": {"causal": True, "window": (3, 0)},
    "score_mod": {"causal": True, "score_mod": lambda score, b, h, i, j: score + i - j},
}


@pytest.mark.parametrize("rules", LAWFUL.values(), ids=LAWFUL)
class TestLaws:
    def test_the_future_does_not_change_the_past(self, rules):
        q, k, v = problem(queries=9, keys=9, dtype=torch.float32)
        before = attend(q, k, v, **rules)
        for x in (q, k, v):
            x[:, :, 6:] += 1
        assert torch.equal(attend(q, k, v, **rules)[:, :, :6], before[:, :, :6])

    def test_batches_are_independent(self, rules):
        q, k, v = problem(dtype=torch.float32)
        whole = attend(q, k, v, **rules)
        v[1, 0, 0] = math.nan
        assert torch.equal(attend(q, k, v, **rules)[0], whole[0])
        torch.testing.assert_close(attend(q[:1], k[:1], v[:1], **rules), whole[:1])

    def test_shared_heads_equal_repeated_heads(self, rules):
        q, k, v = problem()
        repeated = attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), **rules)
        torch.testing.assert_close(attend(q, k, v, **rules), repeated, rtol=1e-12, atol=1e-12)


def test_a_frozen_bias_parameter_is_served_by_sdpa():
    q, k, v = problem()
    bias = draw(9, seed=7, grad=True)
    with torch.no_grad(), recording() as records:
        out = attend(q, k, v, bias=bias)
    assert records[0].impl == "sdpa"
    torch.testing.assert_close(out, oracle(q, k, v, bias=bias.detach())[0])
