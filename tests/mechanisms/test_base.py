"""The kinds of mechanism: what they refuse, and the call that turns one method into attention."""

from __future__ import annotations

import re

import pytest
import torch

from saccade.catalog import Card
from saccade.mechanisms.base import (
    ALL_PATTERNS,
    SELF_PATTERNS,
    Intervention,
    Mixer,
    Reduced,
    Score,
    Selector,
    require,
    require_pattern,
)
from saccade.ops.dispatch import recording
from saccade.types import AttentionOutput, BlockLayout, Geometry, Kind, Pattern, TokenIndex

pytestmark = pytest.mark.quick


def card_of(target, kind, patterns=ALL_PATTERNS, supports=("segments", "lse", "gqa", "backward")):
    return Card("toy", kind, target, "where", "", patterns=frozenset(patterns), supports=frozenset(supports))


class Everything(Selector):
    """Every pair, as blocks; remembers what it was given."""

    def __init__(self):
        self.seen = []

    def select(self, q, k, geometry):
        self.seen.append((q, k, geometry))
        return BlockLayout.dense(q.shape[2], k.shape[2], block=8)


class LastTwo(Selector):
    """Each query sees itself and the key before it, as lists."""

    def select(self, q, k, geometry):
        place = torch.arange(q.shape[2]) + k.shape[2] - q.shape[2]
        return TokenIndex(torch.stack([place, place - 1], 1)[None, None], q.shape[2], k.shape[2])


class Softmax(Score):
    def normalise(self, scores, mask):
        return scores.masked_fill(~mask, -float("inf")).softmax(-1).nan_to_num(0.0)


class Sum(Mixer):
    """Running sum of values; the state is the last sum."""

    def mix(self, q, k, v, causal, state):
        total = v.cumsum(2) if state is None else v.cumsum(2) + state
        return total, total[:, :, -1:]


class Nothing(Intervention):
    def edit(self, weights, mask):
        return weights


class Halve(Intervention):
    def edit(self, weights, mask):
        return weights / 2


for toy, kind in (
    (Everything, Kind.SELECTOR), (LastTwo, Kind.SELECTOR), (Softmax, Kind.SCORE), (Nothing, Kind.INTERVENTION),
    (Halve, Kind.INTERVENTION), (Sum, Kind.MIXER),
):  # fmt: skip
    toy.card = card_of(toy, kind)


def inputs(queries=13, keys=13, heads=4, groups=2):
    torch.manual_seed(0)
    q = torch.randn(2, heads, queries, 8, dtype=torch.float64)
    return q, *(torch.randn(2, groups, keys, 8, dtype=torch.float64) for _ in range(2))


def dense(q, k, v, mask, scale=8**-0.5):
    """Output and log-sum-exp by the definition."""
    shared = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(shared, 1).mT * scale
    scores = scores.masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(shared, 1), scores.logsumexp(-1)


def causal_mask(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def test_require_names_the_setting_its_value_and_what_is_expected():
    require(condition=True, name="window", value=3, expected="anything")
    with pytest.raises(ValueError, match=re.escape("mode='x': expected 'a' or 'b'")):
        require(condition=False, name="mode", value="x", expected="'a' or 'b'")


@pytest.mark.parametrize(
    ("patterns", "causal", "queries", "keys"),
    [
        (SELF_PATTERNS, True, 8, 8),
        (SELF_PATTERNS, True, 3, 8),  # over a cache
        (SELF_PATTERNS, False, 8, 8),
        ({Pattern.CAUSAL_SELF}, True, 1, 8),
        ({Pattern.NONCAUSAL_CROSS}, False, 3, 8),
        ({Pattern.NONCAUSAL_CROSS}, False, 9, 8),
        ({Pattern.CAUSAL_CROSS}, True, 9, 8),
    ],
)
def test_patterns_that_are_defined(patterns, causal, queries, keys):
    card = card_of(Everything, Kind.SELECTOR, patterns)
    assert require_pattern(card, *inputs(queries, keys)[:2], Geometry(causal=causal)) is None


@pytest.mark.parametrize(
    ("patterns", "causal", "queries", "keys"),
    [
        ({Pattern.NONCAUSAL_SELF}, True, 8, 8),
        ({Pattern.CAUSAL_SELF}, False, 8, 8),
        (SELF_PATTERNS, False, 3, 8),
        (SELF_PATTERNS, False, 9, 8),
        (SELF_PATTERNS, True, 9, 8),
        ({Pattern.CAUSAL_CROSS}, False, 9, 8),
        ((), False, 8, 8),
    ],
)
def test_patterns_that_are_not(patterns, causal, queries, keys):
    card = card_of(Everything, Kind.SELECTOR, patterns)
    message = re.escape(
        f"causal={causal} with {queries} queries and {keys} keys: toy is defined for {', '.join(sorted(patterns))}"
    )
    with pytest.raises(ValueError, match=message):
        require_pattern(card, *inputs(queries, keys)[:2], Geometry(causal=causal))


def test_segments_need_the_capability():
    ids = torch.zeros(1, 13, dtype=torch.int64)
    card = card_of(Everything, Kind.SELECTOR, supports=())
    with pytest.raises(ValueError, match="q_segments: toy does not support packed sequences or padding"):
        require_pattern(card, *inputs()[:2], Geometry(q_segments=ids, kv_segments=ids))


@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (1, 13), (5, 13), (13, 5)])
@pytest.mark.parametrize("causal", [True, False])
def test_selector_call_cuts_causality_and_returns_lse(queries, keys, causal):
    q, k, v = inputs(queries, keys)
    mask = causal_mask(queries, keys) if causal else torch.ones(queries, keys, dtype=torch.bool)
    wanted, wanted_lse = dense(q, k, v, mask, scale=0.3)
    result = Everything()(q, k, v, geometry=Geometry(causal=causal), scale=0.3, return_lse=True)
    assert isinstance(result, AttentionOutput)
    torch.testing.assert_close(result.out, wanted, rtol=0, atol=1e-10)
    assert result.lse.shape == (2, 4, queries)
    torch.testing.assert_close(result.lse.double(), wanted_lse, rtol=0, atol=1e-5)
    plain = Everything()(q, k, v, geometry=Geometry(causal=causal), scale=0.3)
    assert torch.equal(plain, result.out)


@pytest.mark.parametrize("impl", ["auto", "eager", "reference"])
@pytest.mark.parametrize("queries", [13, 4])
def test_lists_of_keys_run_on_the_gather_engine(impl, queries):
    q, k, v = inputs(queries)
    mask = causal_mask(queries, 13) & ~torch.ones(queries, 13, dtype=torch.bool).tril(11 - queries)
    with recording() as records:
        result = LastTwo()(q, k, v, geometry=Geometry(causal=True), return_lse=True, impl=impl)
    wanted, wanted_lse = dense(q, k, v, mask)
    torch.testing.assert_close(result.out, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.lse.double(), wanted_lse, rtol=0, atol=1e-5)
    assert "gather_attend" in [entry.op for entry in records]


def test_poisoned_padding_reaches_neither_outputs_nor_gradients():
    ids = torch.tensor([[-1] * 4 + [0] * 5 + [1] * 4, [0] * 13])
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) & (ids >= 0)[:, None, None, :] & causal_mask(13, 13)
    results = []
    for poison in (float("nan"), 0.0):
        q, k, v = inputs()
        k[0, :, :4], v[0, :, :4] = poison, poison
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = Everything()(*leaves, geometry=Geometry(causal=True, q_segments=ids, kv_segments=ids))
        results.append((out, torch.autograd.grad(out.square().sum(), leaves)))
    wanted, _ = dense(q, k, v, mask)
    for out, grads in results:
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
        for got, clean in zip(grads, results[1][1], strict=True):
            torch.testing.assert_close(got, clean, rtol=0, atol=1e-10)
    assert float(results[0][0].detach()[0, :, :4].abs().max()) == 0
    assert float(results[0][1][0][0, :, :4].abs().max()) == 0


def test_select_gets_the_geometry_and_tensors_without_history():
    q, k, v = inputs()
    selector, geometry = Everything(), Geometry(causal=True, grid=(13,))
    out = selector(q.requires_grad_(), k.requires_grad_(), v, geometry=geometry)
    seen_q, seen_k, seen_geometry = selector.seen[0]
    assert not seen_q.requires_grad
    assert not seen_k.requires_grad
    assert seen_geometry is geometry
    assert out.requires_grad


def test_time_to_select_is_recorded_only_while_recording():
    selector = Everything()
    with recording() as records:
        selector(*inputs())
    assert [entry.impl for entry in records if entry.op == "select"] == ["toy"]
    assert next(entry for entry in records if entry.op == "select").select_seconds > 0
    selector(*inputs())
    assert len([entry for entry in records if entry.op == "select"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q of shape \(4, 13, 8\): expected 4 dimensions"),
        (lambda q, k, v: (q, k[..., :7], v), r"k of shape \(2, 2, 13, 7\): expected batch 2 and head dim 8"),
        (lambda q, k, v: (q, k, v[:, :, :5]), r"v of shape \(2, 2, 5, 8\): expected \(2, 2, 13\)"),
        (lambda q, k, v: (q[:, :3], k, v), "k with 2 heads: expected a divisor of q's 3 heads"),
        (lambda q, k, v: (q, k.float(), v), "k is torch.float32 on cpu: expected torch.float64"),
        (lambda q, k, v: (q, k, v.int()), "v of dtype torch.int32: expected a floating-point dtype"),
    ],
)
def test_bad_tensors_are_refused_before_any_work(change, message):
    selector = Everything()
    with pytest.raises(ValueError, match=message):
        selector(*change(*inputs()))
    assert selector.seen == []


def test_bad_segments_are_refused_before_any_work():
    selector, ids = Everything(), torch.zeros(1, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"q_segments of shape \(1, 12\): expected \[2 or 1, 13\]"):
        selector(*inputs(), geometry=Geometry(q_segments=ids, kv_segments=ids))
    assert selector.seen == []


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="impl='fast': block_attend has 'auto'"):
        Everything()(*inputs(), impl="fast")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mechanism", [Softmax(), Nothing()])
def test_scores_and_interventions_that_change_nothing_are_attention(mechanism, causal):
    q, k, v = inputs(7, 13)
    mask = causal_mask(7, 13) if causal else torch.ones(7, 13, dtype=torch.bool)
    out = mechanism(q, k, v, geometry=Geometry(causal=causal), scale=0.3)
    torch.testing.assert_close(out, dense(q, k, v, mask, scale=0.3)[0], rtol=0, atol=1e-10)


def test_an_intervention_edits_the_weights():
    torch.testing.assert_close(Halve()(*inputs()), Nothing()(*inputs()) / 2)


def test_scores_and_interventions_obey_segments():
    q, k, v = inputs()
    ids = torch.tensor([[0] * 5 + [1] * 6 + [-1] * 2])
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) & (ids >= 0)[:, None, None, :]
    for mechanism in (Softmax(), Nothing()):
        out = mechanism(q, k, v, geometry=Geometry(q_segments=ids, kv_segments=ids))
        torch.testing.assert_close(out, dense(q, k, v, mask)[0], rtol=0, atol=1e-10)


def test_mixers_carry_a_state_only_if_they_can(monkeypatch):
    q, k, v = inputs(groups=4)
    whole = Sum()(q, k, v)
    for wrong in ({"return_state": True}, {"state": torch.zeros(1)}):
        with pytest.raises(ValueError, match=f"return_state={wrong.get('return_state', False)}: toy carries no state"):
            Sum()(q, k, v, **wrong)
    monkeypatch.setattr(Sum, "card", card_of(Sum, Kind.MIXER, supports=("streaming",)))
    first, state = Sum()(q[:, :, :6], k[:, :, :6], v[:, :, :6], return_state=True)
    second = Sum()(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole)


def test_reduced_tokens_spread_back():
    tokens = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    reduced = Reduced(tokens, kept=torch.tensor([[0, 2], [1, 2]]), assignment=torch.tensor([[0, 0, 1], [1, 0, 1]]))
    assert reduced.restore(tokens).flatten(1).tolist() == [[1, 1, 2], [4, 3, 4]]
