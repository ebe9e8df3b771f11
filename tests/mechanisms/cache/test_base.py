"""The driver of cache policies."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache import base
from saccade.mechanisms.cache.base import CachedAttention, CachePolicy, Step, decode_step, received_attention
from saccade.mechanisms.cache.store import KVStore
from saccade.types import TokenIndex


@dataclass(frozen=True)
class KeepAll(CachePolicy):
    """Dense caching."""

    def keep(self, store: KVStore) -> Tensor | None:
        return None


@dataclass(frozen=True)
class ReadFirst(KeepAll):
    """Reads slot 0 only, and tracks attention if asked to."""

    track: bool = False

    def store(self) -> KVStore:
        return KVStore(track_attention=self.track)

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
        layer = CachedAttention(KeepAll())
        parts = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
        out = torch.cat([layer(*part, scale=0.3) for part in parts], 2)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        assert layer.bytes_read == 2 * 2 * 11 * (8 + 6) * 8
        assert layer.nbytes == 2 * 2 * 11 * (8 + 6 + 1) * 8


def test_read_selects_without_losing() -> None:
    q, k, v = qkv(5)
    store = KVStore()
    decode_step(KeepAll(), store, q, k, v)
    out, read = decode_step(ReadFirst(), store, q[:, :, :1], k[:, :, :1], v[:, :, :1])
    torch.testing.assert_close(out, v[:, :, :1].repeat_interleave(2, 1), rtol=0, atol=1e-14)
    assert len(store) == 6
    assert read == 2 * 4 * 1 * 14 * 8


def test_received_attention_is_the_column_sum_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = qkv(9)
    q = q[:, :, 4:]
    scores = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(
        ~torch.ones(5, 9, dtype=torch.bool).tril(4), -torch.inf
    )
    expected = scores.softmax(-1).sum(2).view(2, 2, 2, 9).sum(2)
    for limit in (2**22, 150, 1):
        monkeypatch.setattr(base, "SCORE_ELEMENTS", limit)
        torch.testing.assert_close(received_attention(q, k, scores.logsumexp(-1)), expected, rtol=0, atol=1e-12)


def test_reset_and_stack() -> None:
    q, k, v = qkv(3)
    layers = CachedAttention.stack(KeepAll(), 3)
    assert [layer.layer for layer in layers] == [0, 1, 2]
    assert all(layer.step is layers[0].step for layer in layers)
    first = layers[1](q, k, v)
    layers[1].reset()
    assert layers[1].nbytes == 0
    assert torch.equal(layers[1](q, k, v), first)


def test_bad_input() -> None:
    q, k, v = qkv(3)
    with pytest.raises(ValueError, match=r"q=\(2, 4, 3, 8\): expected as many tokens as k, 2"):
        decode_step(KeepAll(), KVStore(), q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="layer=-1: expected at least 0"):
        CachedAttention(KeepAll(), layer=-1)
    with pytest.raises(ValueError, match=r"ReadFirst\(track=True\): read selects and attention is tracked"):
        CachedAttention(ReadFirst(track=True))(q, k, v)
