"""vAttention: token j of a head is where the paper says, kernels without page tables read it, memory grows."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import Everything
from saccade.mechanisms.cache.vattention import ContiguousStore, VAttention

linux = pytest.mark.skipif(sys.platform != "linux", reason="the system maps memory at the first write there")


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024


def tokens(count: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, count, 16, generator=generator) for heads in (4, 2, 2)]


def test_token_j_is_at_start_plus_j_widths_and_never_moves() -> None:
    q, k, v = tokens(300)
    store = VAttention(tokens=8000).store()
    store.append(k[:, :, :1], v[:, :, :1])
    start = [store.view(name).data_ptr() for name in ("key", "value")]
    for first in range(1, 300, 13):
        store.append(k[:, :, first : first + 13], v[:, :, first : first + 13])
    assert [store.view(name).data_ptr() for name in ("key", "value")] == start
    keys, values = store.view("key"), store.view("value")
    for head, j in ((0, 0), (0, 299), (1, 120)):
        address = keys.data_ptr() + head * keys.stride(1) * 4 + j * 16 * 4
        found = torch.frombuffer((ctypes.c_char * 64).from_address(address), dtype=torch.float32)
        assert torch.equal(found, k[0, head, j])
    attended = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], keys, values, enable_gqa=True)
    layer = CachedAttention(Everything())
    layer(*(x[:, :, :-1] for x in (q, k, v)))
    torch.testing.assert_close(attended, layer(*(x[:, :, -1:] for x in (q, k, v))), atol=1e-5, rtol=1e-5)


@linux
def test_memory_is_that_of_the_tokens_not_of_the_reservation() -> None:
    _, k, v = tokens(6000)
    VAttention(tokens=1_000_000).store().append(k, v)
    before = resident()
    store = VAttention(tokens=1_000_000).store()
    store.append(k[:, :, :2000], v[:, :, :2000])
    assert store.reserved_nbytes > 500e6
    for stop in (2000, 4000, 6000):
        if stop > 2000:
            store.append(k[:, :, stop - 2000 : stop], v[:, :, stop - 2000 : stop])
        assert abs(resident() - before - store.nbytes) < 2**20
        assert store.nbytes < 1.1 * 4 * stop * (2 * 16 * 4 + 4)
    store.evict(store.positions < 500)
    assert store.nbytes < 1.3 * 4 * 500 * (2 * 16 * 4 + 4)
    assert abs(resident() - before - store.nbytes) < 2**20
    store.evict(store.positions < 0)
    assert store.nbytes == 0
    assert abs(resident() - before) < 2**20


def test_beams_are_copies_of_the_tokens_alone() -> None:
    _, k, v = tokens(100)
    store = VAttention(tokens=100_000).store()
    store.append(k, v)
    mask = torch.rand(2, 2, 100, generator=torch.Generator().manual_seed(1)) < 0.5
    store.evict(mask)
    other = store.select(torch.tensor([1, 0, 1]))
    assert isinstance(other, ContiguousStore)
    assert torch.equal(other.keys, store.keys[[1, 0, 1]])
    assert torch.equal(other.positions, store.positions[[1, 0, 1]])
    assert other.view("key").shape == other.keys.shape


def test_refusals() -> None:
    _, k, v = tokens(300)
    store = VAttention(tokens=10).store()
    assert store.storage.page == 4096
    with pytest.raises(ValueError, match="4,100 tokens: expected at most 4,096, for which addresses are kept"):
        store.append(*(torch.zeros(1, 1, 4100, 4) for _ in range(2)))
    store.append(k, v)
    store.table.table = store.table.table.flip(0)
    with pytest.raises(ValueError, match="has heads in another order than that of its memory"):
        store.view("key")
    with pytest.raises(ValueError, match="tokens=0: expected at least 1 token"):
        VAttention(tokens=0)
