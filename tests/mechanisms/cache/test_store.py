"""KVStore: what is kept, and that memory is really freed."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.cache.store import KVStore


def filled(tokens: int = 6, track: bool = False) -> KVStore:
    torch.manual_seed(0)
    store = KVStore(track_attention=track)
    store.append(torch.randn(2, 3, tokens, 4), torch.randn(2, 3, tokens, 5))
    return store


def test_append_counts_positions_over_calls() -> None:
    store = filled(4)
    k, v = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 5)
    keys, values = store.append(k, v)
    assert len(store) == 6
    assert store.seen == 6
    assert torch.equal(keys[:, :, 4:], k)
    assert torch.equal(values[:, :, 4:], v)
    assert torch.equal(store.positions, torch.arange(6).expand(2, 3, 6))


def test_append_does_not_hold_on_to_a_larger_tensor() -> None:
    fused = torch.randn(1, 2, 100, 64)
    store = KVStore()
    store.append(fused[:, :, :3, :8], fused[:, :, :3, 8:16])
    assert store.nbytes == 1 * 2 * 3 * (8 * 4 + 8 * 4 + 8)


@pytest.mark.parametrize("track", [False, True])
def test_evict_frees_storage_and_gathers(track: bool) -> None:
    store = filled(6, track=track)
    if track:
        store.add_attention(torch.rand(2, 3, 6))
    before, keys, values = store.nbytes, store.keys, store.values
    keep = torch.stack([torch.randperm(6)[:2].sort().values for _ in range(6)]).view(2, 3, 2)
    store.evict(keep)
    assert store.nbytes * 3 == before
    assert store.keys.untyped_storage().nbytes() == 2 * 3 * 2 * 4 * 4
    assert store.seen == 6
    assert len(store) == 2
    assert store.slot_nbytes == 36
    for b in range(2):
        for g in range(3):
            assert torch.equal(store.keys[b, g], keys[b, g, keep[b, g]])
            assert torch.equal(store.values[b, g], values[b, g, keep[b, g]])
            assert torch.equal(store.positions[b, g], keep[b, g])
    store.append(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 5))
    assert bool((store.positions[..., -1] == 6).all())


def test_evict_everything_leaves_no_bytes() -> None:
    store = filled()
    store.evict(torch.empty(2, 3, 0, dtype=torch.int64))
    assert len(store) == 0
    assert store.nbytes == 0
    assert store.seen == 6


def test_bad_input() -> None:
    store = filled()
    with pytest.raises(ValueError, match=r"keep of shape \(2, 1, 2\)"):
        store.evict(torch.zeros(2, 1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"keep of shape .* torch.int32"):
        store.evict(torch.zeros(2, 3, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"keep in \[0, 6\]: expected slots in \[0, 6\)"):
        store.evict(torch.tensor([0, 6]).expand(2, 3, 2))
    with pytest.raises(ValueError, match="keep: expected ascending"):
        store.evict(torch.tensor([1, 1]).expand(2, 3, 2))
    with pytest.raises(ValueError, match="keep: the store is empty"):
        KVStore().evict(torch.zeros(1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"k of shape \(2, 3, 1, 7\).*expected \(2, 3, 1, 4\)"):
        store.append(torch.randn(2, 3, 1, 7), torch.randn(2, 3, 1, 5))
    with pytest.raises(ValueError, match=r"v of shape \(2, 3, 2, 5\): expected"):
        store.append(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 2, 5))
    with pytest.raises(ValueError, match="received: expected a store with track_attention=True"):
        store.add_attention(torch.zeros(2, 3, 6))
    with pytest.raises(ValueError, match=r"received of shape \(2, 3, 5\): expected \(2, 3, 6\)"):
        filled(6, track=True).add_attention(torch.zeros(2, 3, 5))
