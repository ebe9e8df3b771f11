"""Stores in files: what comes back is what was saved, and nothing damaged comes back."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore

pytest.importorskip("safetensors")

from saccade.mechanisms.cache.files import CacheFileError, load_stores, save_stores


def stores() -> list[KVStore]:
    made = []
    for storage in (Storage(page=8), Storage(bits=4, normalise=True), Storage(dtype=torch.bfloat16), Storage(bits=2)):
        store = KVStore(storage, ("votes",))
        store.append(torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 4))
        store.evict(torch.rand(2, 3, 20) < 0.6)
        store.set_stat("votes", torch.rand(store.positions.shape))
        made.append(store)
    return [*made, KVStore()]


def test_what_comes_back_is_what_was_saved(tmp_path: Path) -> None:
    before, path = stores(), tmp_path / "cache.safetensors"
    save_stores(path, before, {"model": "toy"})
    after, about = load_stores(path)
    assert about == {"model": "toy"}
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]
    for old, new in zip(before[:-1], after[:-1], strict=True):
        assert (new.storage, new.stats, new.ordered) == (old.storage, old.stats, old.ordered)
        for name in ("lengths", "seen", "positions", "keys", "values"):
            assert torch.equal(getattr(new, name), getattr(old, name))
        assert torch.equal(new.stat("votes"), old.stat("votes"))
        more = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 4)
        for store in (old, new):
            store.append(*more)
        assert torch.equal(new.keys, old.keys)
    assert after[-1].empty


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "cache.safetensors"
    save_stores(path, stores(), {})
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CacheFileError, match="not a whole cache"):
            load_stores(path)
    path.write_bytes(whole.replace(b'"0.seen"', b'"0.soon"'))
    with pytest.raises(CacheFileError, match="not a whole cache: KeyError: 'seen'"):
        load_stores(path)
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(CacheFileError, match="not a cache of Saccade, version 1"):
        load_stores(path)
    with pytest.raises(CacheFileError, match="not a whole cache"):
        load_stores(tmp_path / "none")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    save_stores(path, stores(), {})
    before = path.read_bytes()
    (tmp_path / "cache.safetensors.part").mkdir()
    with pytest.raises(OSError, match="cache"):
        save_stores(path, stores(), {})
    assert path.read_bytes() == before


def test_a_full_disk_leaves_file_and_stores_as_they_were(tmp_path: Path) -> None:
    path, kept = tmp_path / "cache.safetensors", stores()
    save_stores(path, kept, {})
    before, keys = path.read_bytes(), [store.keys for store in kept[:-1]]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # as if the disk were full
    try:
        with pytest.raises(OSError, match="cannot be written.*File too large"):
            save_stores(path, kept, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
    assert all(torch.equal(store.keys, was) for store, was in zip(kept, keys, strict=False))
