"""Tiers: the same attention with most pages elsewhere, memory that really falls, and failures that lose nothing."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache import pool as pool_module
from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import CachePolicy, Everything, compose
from saccade.mechanisms.cache.h2o import H2O
from saccade.mechanisms.cache.kivi import Kivi
from saccade.mechanisms.cache.quest import Quest
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.tiered import TieredStore
from saccade.mechanisms.cache.tiers import Backing, Disk, Host, HostPages, PageFile, Tier, TierError

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Beside(Tier):
    """What `Host` does for an accelerator, with the frames on the CPU too."""

    def backing(self, page_nbytes: int, device: torch.device) -> Backing:
        return HostPages(page_nbytes)


@pytest.fixture(autouse=True)
def few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "LEAST", 4)


@pytest.fixture(params=["disk", "host"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Tier:
    return Disk(tmp_path, resident=0.25) if request.param == "disk" else Beside(resident=0.25)


def tokens(count: int, batch: int = 2, dim: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, count, dim, generator=generator) for heads in (4, 2, 2)]


def sizes(prompt: int, chunk: int, steps: int) -> Iterator[slice]:
    yield slice(0, prompt)
    yield slice(prompt, prompt + chunk)
    yield from (slice(i, i + 1) for i in range(prompt + chunk, prompt + chunk + steps))


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow past one byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


POLICIES = {
    "everything": Everything(Storage(page=8)),
    "8 bits": Everything(Storage(bits=8, page=8)),
    "4 bits, normalised": Everything(Storage(bits=4, normalise=True, page=8)),
    "2 bits": Everything(Storage(bits=2, page=8)),
    "bf16": Everything(Storage(dtype=torch.bfloat16, page=8)),
    "quest": compose(read=Quest(tokens=32, page=8, dense_layers=0), store=Storage(page=8)),
    "h2o": compose(keep=H2O(heavy=64, recent=64), store=Storage(page=8)),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_tier_changes_where_it_lies_and_nothing_else(policy: CachePolicy, tier: Tier) -> None:
    plain, tiered = CachedAttention(policy), CachedAttention(policy, tier=tier)
    inputs = tokens(260)
    coarse = 2e-2 if policy.storage().dtype is torch.bfloat16 else 1e-5  # partial results are merged in that type
    for part in sizes(200, 20, 15):
        piece = [x[:, :, part] for x in inputs]
        torch.testing.assert_close(tiered(*piece), plain(*piece), atol=coarse, rtol=coarse)
        assert tiered.bytes_read == plain.bytes_read
    store, other = tiered.kept, plain.kept
    assert isinstance(store, TieredStore)
    assert store.pool.frames.pages <= store.pool.limit
    assert store.away_nbytes > 0.7 * (store.nbytes + store.away_nbytes) * (1 - tier.resident)
    assert torch.equal(store.keys, other.keys)
    assert torch.equal(store.positions, other.positions)
    slots = torch.tensor([5, 100, -1, 7]).expand(2, 4, 4)
    for got, expected in zip(store.gather(slots), other.gather(slots), strict=True):
        assert torch.equal(got, expected)


def test_forks_share_both_tiers_until_written_to(tier: Tier) -> None:
    _, k, v = tokens(150)
    store = TieredStore(tier, Storage(page=8))
    store.append(k, v)
    held = store.nbytes + store.away_nbytes
    fork, beams = store.fork(), store.select(torch.tensor([1, 1, 0]))
    assert store.nbytes + store.away_nbytes == held
    mask = torch.rand(2, 2, 150, generator=torch.Generator().manual_seed(2)) < 0.5
    fork.evict(mask)
    beams.append(k[[0, 1, 0], :, :1], v[[0, 1, 0], :, :1])
    assert torch.equal(store.keys, k)
    assert torch.equal(store.values, v)
    assert torch.equal(beams.keys[:, :, :150], k[[1, 1, 0]])
    fork.sort()
    kept = mask[0, 0].nonzero().flatten()
    assert torch.equal(fork.values[0, 0, : len(kept)], v[0, 0, kept])
    del fork, beams
    assert store.nbytes + store.away_nbytes == held
    store.evict(torch.zeros(2, 2, 150, dtype=torch.bool))
    assert (store.nbytes, store.away_nbytes) == (0, 0)


@linux
def test_memory_of_the_process_falls(tmp_path: Path) -> None:
    _, k, v = tokens(16_384, batch=1, dim=64)
    TieredStore(Disk(tmp_path)).append(k, v)  # what torch sets up on first use
    before = resident()
    store = TieredStore(Disk(tmp_path, resident=0.25))
    store.append(k, v)
    whole = 2 * k.nbytes
    assert store.nbytes < 0.28 * whole
    assert store.away_nbytes == pytest.approx(0.75 * whole, rel=0.01)
    assert abs(resident() - before - store.nbytes) < 4 * 2**20
    query = torch.randn(1, 4, 1, 64)
    layer = CachedAttention(Everything(), tier=Disk(tmp_path, resident=0.25))
    layer.kept = store
    layer(query, k[:, :, :1], v[:, :, :1])
    assert abs(resident() - before - store.nbytes) < 4 * 2**20
    del store, layer
    assert resident() - before < 4 * 2**20


def test_the_next_layers_pages_are_fetched_meanwhile(tmp_path: Path) -> None:
    policy = POLICIES["quest"]
    layers = CachedAttention.stack(policy, 2, Disk(tmp_path, resident=0.5))
    inputs = tokens(200)
    for part in sizes(180, 10, 5):
        for layer in layers:
            layer(*(x[:, :, part] for x in inputs))
    first, second = (layer.kept for layer in layers)
    expected = second._expected
    first.pool.settle()
    second.pool.settle()
    second.pool._release(10_000, torch.zeros(0, dtype=torch.int64))
    assert bool((second.pool.frame < 0).all())
    layers[0](*(x[:, :, 195:196] for x in inputs))
    second.pool._coming.result()
    assert bool((second.pool.frame[expected[: second.pool.limit // 2]] >= 0).all())


def test_reading_everything_fetches_only_what_has_no_frame(tmp_path: Path) -> None:
    layer = CachedAttention(POLICIES["everything"], tier=Disk(tmp_path, resident=0.5))
    inputs = tokens(1024)
    layer(*(x[:, :, :1000] for x in inputs))
    away = []
    for i in range(1000, 1006):
        pool, before = layer.kept.pool, layer.kept.pool.fetched
        layer(*(x[:, :, i : i + 1] for x in inputs))
        pool.settle()
        away.append((pool.fetched - before) / (layer.kept.away_nbytes + pool.frames.nbytes))
    assert max(away[1:]) < 0.6
    assert min(away[1:]) > 0.3


def test_a_full_disk_is_told_once_and_loses_nothing(tmp_path: Path) -> None:
    plain, tiered = (
        CachedAttention(POLICIES["h2o"]),
        CachedAttention(POLICIES["h2o"], tier=Disk(tmp_path, resident=0.1)),
    )
    inputs = tokens(240)
    parts = list(sizes(200, 1, 39))

    def both(part: slice) -> None:
        piece = [x[:, :, part] for x in inputs]
        torch.testing.assert_close(tiered(*piece), plain(*piece), atol=1e-5, rtol=1e-5)

    with full_disk():
        both(parts[0])
        assert tiered.kept.away_nbytes == 0
        seen = tiered.kept.seen.clone()
        with pytest.raises(
            TierError, match=r"path='.*': no room for [\d,]+ more bytes of keys and values \(.*File too"
        ):
            tiered(*(x[:, :, parts[1]] for x in inputs))
        assert torch.equal(tiered.kept.seen, seen)
        for part in parts[1:20]:
            both(part)
        assert tiered.kept.away_nbytes == 0
    for part in parts[20:]:
        both(part)
    assert tiered.kept.away_nbytes > 0


def test_a_file_that_was_cut_off_is_told(tmp_path: Path) -> None:
    _, k, v = tokens(150)
    store = TieredStore(Disk(tmp_path, resident=0.25), Storage(page=8))
    store.append(k, v)
    file = store.pool.backing.file.fileno()
    contents = os.pread(file, os.fstat(file).st_size, 0)
    os.ftruncate(file, 100)
    with pytest.raises(
        TierError, match=r"cannot be read back: the file was cut off, it has 100 bytes, expected [\d,]+"
    ):
        store.keys  # noqa: B018
    os.pwrite(file, contents, 0)
    assert torch.equal(store.keys, k)


def test_bad_tiers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resident=0: expected a part of the pages, above 0 and at most 1"):
        Disk(tmp_path, resident=0)
    with pytest.raises(ValueError, match=r"path='.*nowhere': expected a directory that exists"):
        Disk(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="device='cpu': expected an accelerator"):
        TieredStore(Host()).append(*tokens(3)[1:])
    with pytest.raises(ValueError, match="has a store of its own form, which has no second tier"):
        CachedAttention(Kivi(), tier=Disk(tmp_path))
    with pytest.raises(ValueError, match="expected a store without a tier, whose pages can be read in place"):
        TieredStore(Disk(tmp_path)).pages()
    with pytest.raises(TierError, match=r"path='/proc/self': cannot hold a file for keys and values"):
        PageFile("/proc/self", 64)
