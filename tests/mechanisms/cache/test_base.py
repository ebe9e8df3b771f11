"""The driver of cache policies."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache import weights
from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import (
    CachePolicy,
    Everything,
    Step,
    best,
    compose,
    decode_step,
    received_attention,
)
from saccade.mechanisms.cache.h2o import H2O
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.types import TokenIndex


@dataclass(frozen=True)
class ReadFirst(CachePolicy):
    """Reads slot 0 only, and wants all attention if asked to."""

    needs_lse: bool = False

    def read(self, q: Tensor, store: KVStore, step: Step) -> TokenIndex:
        return TokenIndex(torch.zeros(1, 1, q.shape[2], 1, dtype=torch.int64), q.shape[2], len(store))


def qkv(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    return (
        torch.randn(2, 4, tokens, 8, dtype=dtype),
        torch.randn(2, 2, tokens, 8, dtype=dtype),
        torch.randn(2, 2, tokens, 6, dtype=dtype),
    )


def test_keep_all_is_dense_causal_in_any_chunks() -> None:
    q, k, v = qkv(11)
    wide_k, wide_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ wide_k.mT * 0.3).masked_fill(~torch.ones(11, 11, dtype=torch.bool).tril(), -torch.inf)
    expected = scores.softmax(-1) @ wide_v
    for sizes in ([11], [4, 5, 2], [1] * 11, [9, 1, 1]):
        layer = CachedAttention(Everything())
        parts = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
        out = torch.cat([layer(*part, scale=0.3) for part in parts], 2)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        assert layer.bytes_read == 2 * 2 * 11 * (8 + 6) * 8
        assert layer.nbytes == 2 * 2 * 64 * ((8 + 6) * 8 + 4)


def test_read_selects_without_losing() -> None:
    q, k, v = qkv(5)
    store = KVStore()
    decode_step(Everything(), store, q, k, v)
    out, read = decode_step(ReadFirst(), store, q[:, :, :1], k[:, :, :1], v[:, :, :1])
    torch.testing.assert_close(out, v[:, :, :1].repeat_interleave(2, 1), rtol=0, atol=1e-14)
    assert len(store) == 6
    assert read == 2 * 2 * 1 * 14 * 8


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_received_attention_is_the_column_sum_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None
) -> None:
    q, k, _ = qkv(9)
    q = q[:, :, 4:]
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~torch.ones(5, 9, dtype=torch.bool).tril(4), -torch.inf)
    expected = scores.softmax(-1).sum(2).view(2, 2, 2, 9).sum(2)
    store = KVStore()
    store.append(k, k)
    step = Step(softcap=softcap, lse=scores.logsumexp(-1))
    for limit in (2**22, 150, 1):
        monkeypatch.setattr(weights, "SCORE_ELEMENTS", limit)
        torch.testing.assert_close(received_attention(q, store, step), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="step.lse=None: expected the log-sum-exp"):
        received_attention(q, store, Step())


@pytest.mark.parametrize("policy", [Everything(), H2O(heavy=3, recent=3), SinkRecent(sinks=1, recent=6)])
def test_left_padded_equals_alone(policy: CachePolicy) -> None:
    q, k, v = qkv(14)
    present = torch.ones(2, 9, dtype=torch.bool)
    present[1, :4] = False
    padded, alone = CachedAttention(policy), CachedAttention(policy)
    if isinstance(policy, SinkRecent):
        policy = SinkRecent(sinks=1, recent=20)  # reads by layout in a prompt, which wants heads of one length
        padded, alone = CachedAttention(policy), CachedAttention(policy)
    parts = [x[:, :, :9] for x in (q, k, v)]
    first = padded(*parts, present=present)
    assert not bool(first[1, :, :4].any())
    torch.testing.assert_close(first[1:, :, 4:], alone(*(x[1:, :, 4:] for x in parts)), rtol=0, atol=1e-12)
    for i in range(9, 14):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        torch.testing.assert_close(padded(*token)[1:], alone(*(x[1:] for x in token)), rtol=0, atol=1e-12)
    assert padded.kept.seen.tolist() == [14, 10]


def test_composed_policies_take_each_axis_from_its_own() -> None:
    q, k, v = qkv(40)
    policy = compose(keep=H2O(heavy=3, recent=5), store=Storage(bits=8))
    layer = CachedAttention(policy)
    layer(q, k, v)
    assert layer.kept.lengths.tolist() == [[8, 8], [8, 8]]
    assert layer.kept.slot_nbytes == 8 + 6 + 2 * 4
    reading = CachedAttention(compose(keep=SinkRecent(sinks=2, recent=7), read=ReadFirst()))
    out = [reading(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(12)]
    torch.testing.assert_close(out[-1], v[:, :, :1].repeat_interleave(2, 1), rtol=0, atol=1e-14)
    assert reading.bytes_read == 2 * 2 * 14 * 8
    assert len(reading.kept) == 8


def test_best_takes_earlier_slots_first_and_never_what_is_hidden() -> None:
    scores = torch.tensor([[[1.0, 2.0, 2.0, -torch.inf], [-torch.inf, 0.0, -torch.inf, -torch.inf]]])
    assert best(scores, 1).tolist() == [[[False, True, False, False], [False, True, False, False]]]
    assert best(scores, 3).tolist() == [[[True, True, True, False], [False, True, False, False]]]
    assert not bool(best(scores, 0).any())


def test_reset_and_stack() -> None:
    q, k, v = qkv(3)
    layers = CachedAttention.stack(Everything(), 3)
    assert [layer.layer for layer in layers] == [0, 1, 2]
    assert all(layer.step is layers[0].step for layer in layers)
    first = layers[1](q, k, v)
    layers[1].reset()
    assert layers[1].nbytes == 0
    assert torch.equal(layers[1](q, k, v), first)


def test_bad_input() -> None:
    q, k, v = qkv(3)
    with pytest.raises(ValueError, match=r"q=\(2, 4, 3, 8\): expected as many tokens as k, 2"):
        decode_step(Everything(), KVStore(), q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="layer=-1: expected at least 0"):
        CachedAttention(Everything(), layer=-1)
    with pytest.raises(ValueError, match=r"ReadFirst\(needs_lse=True\): needs the attention of all that is kept"):
        CachedAttention(ReadFirst(needs_lse=True))(q, k, v)
    with pytest.raises(ValueError, match=r"H2O\(.*\): needs the attention of all that is kept"):
        compose(keep=H2O(), read=ReadFirst())
    with pytest.raises(ValueError, match="keep=3: expected a CachePolicy, or None"):
        compose(keep=3)
