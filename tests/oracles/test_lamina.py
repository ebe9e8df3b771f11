"""Lamina against its paper's equations: attention of two disjoint sets of tokens, combined by their sums of exps."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import Everything, compose, decode_step
from saccade.mechanisms.cache.lamina import Lamina
from saccade.mechanisms.cache.offload import AttentionWorker, WorkerError, running_worker
from saccade.mechanisms.cache.remote import RemoteStore
from saccade.mechanisms.cache.sink_recent import SinkRecent


def oracle(q: Tensor, k: Tensor, v: Tensor, token: int) -> Tensor:
    """A_q(I) = sum_I exp(q k) v and S_q(I) = sum_I exp(q k), of the tokens before and of the token, combined."""
    out = torch.zeros(*q.shape[:2], v.shape[3], dtype=q.dtype)
    for entry in range(q.shape[0]):
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            sums = []
            for part in (range(token), [token]):
                weights = [
                    math.exp(float(q[entry, head, token] @ k[entry, group, j]) / q.shape[3] ** 0.5) for j in part
                ]
                values = [w * v[entry, group, j] for w, j in zip(weights, part, strict=True)]
                sums.append((sum(values), sum(weights)))
            out[entry, head] = (sums[0][0] + sums[1][0]) / (sums[0][1] + sums[1][1])
    return out


def problem(tokens: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, tokens, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]


def test_decoded_tokens_are_the_papers() -> None:
    inputs = problem()
    layer = CachedAttention(Lamina())
    layer(*(x[:, :, :20] for x in inputs))
    for token in range(20, 24):
        out = layer(*(x[:, :, token : token + 1] for x in inputs))
        torch.testing.assert_close(out[:, :, 0], oracle(*inputs, token))
    assert layer.nbytes == 0
    assert layer.kept.remote_nbytes >= 2 * 24 * 2 * 2 * 8 * 8


def test_the_query_may_go_first() -> None:
    q, k, v = problem()
    store = Lamina().store()
    store.append(k[:, :, :20], v[:, :, :20])
    for token in range(20, 24):
        one = slice(token, token + 1)
        store.begin(q[:, :, one])
        store.append(k[:, :, one], v[:, :, one])
        out, lse = store.attend(q[:, :, one])
        torch.testing.assert_close(out[:, :, 0], oracle(q, k, v, token))
        assert lse.shape == (2, 4, 1)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_one_answer_with_attention_in_this_process(bits: int | None) -> None:
    inputs = [x.float() for x in problem(60)]
    here, there = CachedAttention(Everything(Lamina(bits).storage())), CachedAttention(Lamina(bits))
    present = torch.ones(2, 40, dtype=torch.bool)
    present[1, :7] = False
    parts = [slice(0, 40), slice(40, 44), *(slice(i, i + 1) for i in range(44, 60))]
    for part in parts:
        piece = [x[:, :, part] for x in inputs]
        mask = present if part.start == 0 else None
        torch.testing.assert_close(there(*piece, present=mask), here(*piece, present=mask), atol=1e-5, rtol=1e-5)
        assert there.bytes_read == here.bytes_read


def test_beams_forks_and_crop() -> None:
    q, k, v = (x.float() for x in problem(40))
    stores = [Everything().store(), Lamina().store()]
    for store in stores:
        store.append(k[:, :, :30], v[:, :, :30])
    stores = [store.select(torch.tensor([1, 0, 1])) for store in stores]
    for store in stores:
        store.append(k[[0, 1, 0], :, 30:31], v[[0, 1, 0], :, 30:31])
        store.crop(2)
        assert store.seen.tolist() == [29, 29, 29]
    piece = [x[[0, 1, 1], :, 31:32] for x in (q, k, v)]
    here, there = (decode_step(Everything(), store, *piece)[0] for store in stores)
    torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-5)


def test_a_dead_worker_is_one_clear_error_and_the_next_cache_has_another() -> None:
    q, k, v = problem()
    layer = CachedAttention(Lamina(threads=1))
    layer(q, k, v)
    worker = layer.kept.worker
    assert worker is running_worker(1)
    os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=rf"process {worker.process.pid}, has ended \(exit status -9\) and with it"):
        layer(*(x[:, :, :1] for x in (q, k, v)))
    layer.reset()
    assert layer(q, k, v).shape == q.shape
    assert layer.kept.worker is not worker


def test_what_fails_in_the_worker_is_told_and_it_goes_on() -> None:
    q, k, v = problem()
    store = Lamina().store()
    store.append(k, v)
    with pytest.raises(WorkerError, match="failed to attend: ValueError: q of shape"):
        store._ask({"do": "attend", "scale": 1.0}, q[0])
    store.begin(q[:, :, :1, :5])
    store.append(k[:, :, :1], v[:, :, :1])
    with pytest.raises(WorkerError, match="failed to finish: ValueError"):
        store.attend(q[:, :, :1])
    assert store.attend(q[:, :, :2]).out.shape == (2, 4, 2, 8)


def test_no_worker_is_left_behind() -> None:
    worker = AttentionWorker()
    process = worker.process
    assert worker.alive
    del worker
    assert process.poll() is not None


def test_what_needs_the_tokens_here_is_refused() -> None:
    _, k, v = problem()
    store = RemoteStore()
    store.append(k, v)
    for use in (lambda: store.keys, lambda: store.stat("votes"), lambda: store.evict(~store.present)):
        with pytest.raises(ValueError, match="is in an attention worker, expected a cache in this process"):
            use()
    with pytest.raises(ValueError, match="stores have a form of their own"):
        compose(keep=SinkRecent(), store=Lamina())
    with pytest.raises(ValueError, match="bits=2: expected 8, 4, or None"):
        Lamina(bits=2)
    with pytest.raises(ValueError, match="threads=-1: expected at least 1, or 0"):
        Lamina(threads=-1)
