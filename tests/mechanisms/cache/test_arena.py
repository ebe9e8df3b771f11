"""Arena: memory is taken as pages are written and given back to the system at once."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import pytest
import torch

from saccade.mechanisms.cache import arena as module
from saccade.mechanisms.cache.arena import Arena
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")


def resident() -> int:
    """Bytes of anonymous memory that the process holds, what torch has freed not counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024


def test_pages_are_counted_shared_and_used_again() -> None:
    arena = Arena(128, CPU)
    assert arena.nbytes == 0
    pages = arena.take(5)
    assert pages.tolist() == [0, 1, 2, 3, 4]
    arena.share(pages[:2])
    arena.give_back(pages[1:])
    assert arena.pages == 2
    assert arena.shared == 1
    assert arena.take(4).unique().tolist() == [2, 3, 4, 5]
    arena.give_back(torch.tensor([0, 0, 1, 2, 3, 4, 5]))
    assert (arena.pages, arena.shared, arena.nbytes) == (0, 0, 0)


@pytest.mark.parametrize("mapped", [True, False])
def test_growing_moves_what_is_in_use(monkeypatch: pytest.MonkeyPatch, mapped: bool) -> None:
    monkeypatch.setattr(module, "RESERVED", 64 * 256)
    monkeypatch.setattr(module, "STRETCH", 1000)
    if not mapped:
        monkeypatch.setattr(module.sys, "platform", "elsewhere")
    arena = Arena(256, CPU)
    held: dict[int, int] = {}
    for step in range(60):
        pages = arena.take(7)
        arena.bytes[pages] = step
        held |= dict.fromkeys(pages.tolist(), step)
        gone = pages[::3]
        arena.give_back(gone)
        held = {page: mark for page, mark in held.items() if page not in gone.tolist()}
    assert all(bool((arena.bytes[page] == mark).all()) for page, mark in held.items())
    assert arena.pages == len(held)


@linux
def test_memory_returns_to_the_system() -> None:
    arena = Arena(20_000, CPU)
    before = resident()
    pages = arena.take(4000)
    arena.bytes[pages] = 1
    full = resident() - before
    assert abs(full - arena.nbytes) < 2**21
    arena.give_back(pages[::2])
    arena.give_back(pages[1:2001:2])
    assert arena.nbytes == 1000 * 20_000
    assert abs(resident() - before - arena.nbytes) < 2**21 + 1000 * 4096
    arena.give_back(pages[2001::2])
    assert resident() - before < 2**21


@linux
def test_small_pages_return_when_the_last_of_a_system_page_goes() -> None:
    arena = Arena(704, CPU)
    before = resident()
    pages = arena.take(40_000)
    arena.bytes[pages] = 1
    for start in range(7):
        arena.give_back(pages[start::7])
    assert resident() - before < 40_000 * 704 / 4  # what Python's own list of free pages takes


@linux
@pytest.mark.parametrize(
    ("storage", "bits"),
    [(Storage(), 32), (Storage(dtype=torch.bfloat16), 16), *((Storage(bits=bits), bits + 1) for bits in (8, 4, 2))],
    ids=lambda value: f"{value.bits or value.dtype}" if isinstance(value, Storage) else "",
)
def test_a_store_holds_what_it_says(storage: Storage, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 4, 16_384, 64, generator=generator) for _ in range(2))
    mask = torch.rand(1, 4, 16_384, generator=generator) < 0.25
    KVStore(storage).append(k[:, :, :64], v[:, :, :64])  # what torch sets up on first use
    before = resident()
    store = KVStore(storage)
    store.append(k, v)
    whole = 2 * 4 * 16_384 * 64 * bits // 8
    assert 0.8 * whole < store.nbytes < 1.1 * whole
    assert abs(resident() - before - store.nbytes) < 4 * 2**20
    held = store.nbytes
    store.evict(mask)
    assert store.nbytes < 0.27 * held
    assert abs(resident() - before - store.nbytes) < 4 * 2**20
    del store
    assert resident() - before < 4 * 2**20
