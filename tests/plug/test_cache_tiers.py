"""`PagedCache` with a tier: the same tokens from less memory, also after a disk was full or a file cut off."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache import pool as pool_module
from saccade.mechanisms.cache.base import CachePolicy, Everything, compose
from saccade.mechanisms.cache.instinfer import InstInfer
from saccade.mechanisms.cache.kivi import Kivi
from saccade.mechanisms.cache.lamina import Lamina
from saccade.mechanisms.cache.offload import WorkerError
from saccade.mechanisms.cache.quest import Quest
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.tiers import Disk, TierError
from saccade.mechanisms.cache.vattention import VAttention
from saccade.plug import LayerCache, PagedCache, Recipe, apply

Build = Callable[..., Any]
SMALL = Storage(page=4)
POLICIES = [
    Everything(SMALL),
    compose(read=Quest(tokens=16, page=4, dense_layers=0), store=SMALL),
    compose(keep=SinkRecent(4, 20), store=SMALL),
]


@pytest.fixture(autouse=True)
def few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "LEAST", 2)


def greedy(model: Any, cache: PagedCache, ids: Tensor, steps: int) -> list[Tensor]:
    """The prompt, or next tokens `[B, 1]`, and then `steps` more."""
    found = []
    for _ in range(steps):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        found.append(ids)
    return found


def until_full(model: Any, cache: PagedCache, found: list[Tensor]) -> None:
    """At most ten tokens."""
    while len(found) < 10:
        found += greedy(model, cache, found[-1], 1)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same(tiny: Build, ids: Tensor, policy: CachePolicy, beams: int, tmp_path: Path) -> None:
    model = tiny()
    with apply(model, Recipe.uniform(model, "dense")):
        caches = [PagedCache(model, policy), PagedCache(model, policy, tier=Disk(tmp_path, resident=0.2))]
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams}
        outs = [model.generate(ids, past_key_values=cache, **options) for cache in caches]
    assert torch.equal(*outs)
    assert caches[1].away_nbytes > 0
    near, far = (sum(layer.store.table.arena.nbytes for layer in cache.layers) for cache in caches)
    assert far < 0.6 * near  # pages alone: what Quest keeps of them stays in memory
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_recipe_s_cache_in_a_tier(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model = tiny()
    recipe = Recipe.uniform(model, "dense", cache=LayerCache(store=SMALL))
    with apply(model, recipe):
        near, far = recipe.make_cache(model), recipe.make_cache(model, tier=Disk(tmp_path, resident=0.2))
        found = [torch.cat(greedy(model, cache, ids, 4), 1) for cache in (near, far)]
    assert torch.equal(*found)
    assert far.away_nbytes > 0
    assert far.nbytes < near.nbytes


@torch.no_grad()
def test_saved_and_loaded_with_a_tier(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model = tiny()
    with apply(model, Recipe.uniform(model, "dense")):
        tiered = PagedCache(model, POLICIES[0], tier=Disk(tmp_path, resident=0.2))
        (token,) = greedy(model, tiered, ids, 1)
        tiered.save(tmp_path / "cache.safetensors")
        for cache in (PagedCache(model, POLICIES[0]), PagedCache(model, POLICIES[0], tier=Disk(tmp_path))):
            cache.load(tmp_path / "cache.safetensors")
            assert (cache.away_nbytes > 0) == (cache.tier is not None)
            expected = greedy(model, cache, token, 5)
        assert torch.equal(torch.cat(greedy(model, tiered, token, 5)), torch.cat(expected))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@torch.no_grad()
def test_a_full_disk_in_the_midst_of_generation(
    tiny: Build, ids: Tensor, policy: CachePolicy, tmp_path: Path
) -> None:  # fmt: skip
    model = tiny()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with apply(model, Recipe.uniform(model, "dense")):
        expected = greedy(model, PagedCache(model, policy), ids, 20)
        cache = PagedCache(model, policy, tier=Disk(tmp_path, resident=0.1))
        found = greedy(model, cache, ids, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        try:
            with pytest.raises(TierError, match=r"no room for [\d,]+ more bytes of keys and values"):
                until_full(model, cache, found)
            found += greedy(model, cache, found[-1], 15 - len(found))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        found += greedy(model, cache, found[-1], 20 - len(found))
    assert torch.equal(torch.cat(found), torch.cat(expected))


@torch.no_grad()
def test_a_cut_file_in_the_midst_of_generation(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model = tiny()
    with apply(model, Recipe.uniform(model, "dense")):
        expected = greedy(model, PagedCache(model, POLICIES[0]), ids, 12)
        cache = PagedCache(model, POLICIES[0], tier=Disk(tmp_path, resident=0.1))
        found = greedy(model, cache, ids, 5)
        pool = cache.layers[1].store.pool
        pool.settle()
        file = pool.backing.file.fileno()
        contents = os.pread(file, os.fstat(file).st_size, 0)
        os.ftruncate(file, 10)
        for _ in range(2):
            with pytest.raises(TierError, match="the file was cut off, it has 10 bytes, expected"):
                greedy(model, cache, found[-1], 1)
        assert cache.get_seq_length() == 44
        os.pwrite(file, contents, 0)
        found += greedy(model, cache, found[-1], 7)
    assert torch.equal(torch.cat(found), torch.cat(expected))


@torch.no_grad()
def test_a_prompt_that_failed_midway_can_be_repeated(
    tiny: Build, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    with apply(model, Recipe.uniform(model, "dense")):
        expected = greedy(model, PagedCache(model, POLICIES[2]), ids, 3)
        cache = PagedCache(model, POLICIES[2], tier=Disk(tmp_path))
        with monkeypatch.context() as patch:
            patch.setattr(cache.layers[1].store, "append", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
            with pytest.raises(MemoryError, match="no memory"):
                greedy(model, cache, ids, 1)
        assert torch.equal(torch.cat(greedy(model, cache, ids, 3)), torch.cat(expected))


@pytest.mark.parametrize("policy", [Lamina(), InstInfer(resident=0.5), VAttention(tokens=512)], ids=repr)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_from_elsewhere_is_the_same(tiny: Build, ids: Tensor, policy: CachePolicy, beams: int) -> None:
    model = tiny()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams}
    padded, keep = ids.clone(), torch.ones_like(ids)
    padded[1, :9] = keep[1, :9] = 0
    with apply(model, Recipe.uniform(model, "dense")):
        caches = [PagedCache(model, Everything()), PagedCache(model, policy)]
        outs = [model.generate(padded, attention_mask=keep, past_key_values=cache, **options) for cache in caches]
    assert torch.equal(*outs)
    assert not isinstance(policy, Lamina | InstInfer) or caches[1].nbytes == 0


@torch.no_grad()
def test_a_worker_that_dies_in_the_midst_of_generation(tiny: Build, ids: Tensor, tmp_path: Path) -> None:
    model = tiny()
    with apply(model, Recipe.uniform(model, "dense")):
        cache = PagedCache(model, Lamina(threads=1))
        found = greedy(model, cache, ids, 3)
        cache.layers[1].store.worker.process.kill()
        with pytest.raises(WorkerError, match=r"the attention worker, process \d+, has ended \(exit status -9\)"):
            greedy(model, cache, found[-1], 1)
        with pytest.raises(WorkerError, match=r"the attention worker, process \d+, has ended"):
            cache.save(tmp_path / "cache.safetensors")
        assert list(tmp_path.iterdir()) == []
        again = PagedCache(model, Lamina(threads=1))
        assert torch.equal(torch.cat(greedy(model, again, ids, 3)), torch.cat(found))


def test_policies_without_a_tier_are_refused(tiny: Build, tmp_path: Path) -> None:
    model = tiny()
    with (
        apply(model, Recipe.uniform(model, "dense")),
        pytest.raises(ValueError, match=r"tier=Disk.*expected None: Kivi.*has a store of its own form"),
    ):
        PagedCache(model, Kivi(), tier=Disk(tmp_path))
