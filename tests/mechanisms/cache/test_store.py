"""KVStore: ragged, in pages, quantised, shared; every operation against plain lists of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.merging import merge_slots
from saccade.mechanisms.cache.reading import attend_stored
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore

B, G, D, E = 2, 3, 8, 12
PAGES = Storage(page=4)


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, G, count, D, generator=generator), torch.randn(B, G, count, E, generator=generator)


def filled(count: int = 6, storage: Storage = PAGES, **options: Any) -> KVStore:
    store = KVStore(storage, **options)
    store.append(*tokens(count))
    return store


def contents(store: KVStore, b: int, g: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Position -> key and value, of one head."""
    n = int(store.lengths[b, g])
    positions = store.positions[b, g].tolist()
    assert all(position == -1 for position in positions[n:])
    assert len(set(positions[:n])) == n
    keys, values = store.keys[b, g], store.values[b, g]
    assert not bool(keys[n:].any())
    return {position: (keys[slot], values[slot]) for slot, position in enumerate(positions[:n])}


def expect_contents(store: KVStore, b: int, g: int, k: Tensor, v: Tensor, places: list[int]) -> None:
    found = contents(store, b, g)
    assert sorted(found) == sorted(places)
    for place in places:
        assert torch.equal(found[place][0], k[b, g, place])
        assert torch.equal(found[place][1], v[b, g, place])


def test_append_in_any_pieces() -> None:
    k, v = tokens(11)
    for sizes in ([11], [1] * 11, [4, 1, 6], [3, 8]):
        store = KVStore(PAGES)
        for part_k, part_v in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True):
            store.append(part_k, part_v)
        assert len(store) == 11
        assert store.seen.tolist() == [11, 11]
        assert store.complete
        assert torch.equal(store.keys, k)
        assert torch.equal(store.values, v)
        assert torch.equal(store.positions, torch.arange(11).expand(B, G, 11))


def test_append_takes_pages_as_they_fill_and_nothing_else_is_held() -> None:
    store = KVStore(PAGES)
    for count in range(1, 10):
        store.append(*tokens(1))
        page = 64 * 2 * -(-4 * D // 32) + 4 * E * 4 + 64
        assert store.nbytes == -(-count // 4) * B * G * page
    assert store.slot_nbytes == (D + E) * 4


def test_padding_is_not_stored_and_takes_no_position() -> None:
    k, v = tokens(7)
    present = torch.ones(B, 7, dtype=torch.bool)
    present[1, :4] = False
    store = KVStore(PAGES)
    store.append(k, v, present)
    assert store.lengths.tolist() == [[7] * G, [3] * G]
    assert store.seen.tolist() == [7, 3]
    assert store.positions[1, 0].tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert torch.equal(store.keys[1, :, :3], k[1, :, 4:])
    more = tokens(2, seed=1)
    store.append(*more)
    assert torch.equal(store.keys[1, :, 3:5], more[0][1])
    assert torch.equal(store.keys[0, :, 7:], more[0][0])


def test_evict_is_ragged_and_append_goes_on() -> None:
    k, v = tokens(24)
    store = KVStore(PAGES)
    store.append(k[:, :, :21], v[:, :, :21])
    keep = torch.rand(B, G, 21, generator=torch.Generator().manual_seed(3)) < torch.tensor([0.1, 0.5, 0.9])[:, None]
    store.evict(keep)
    places = [[keep[b, g].nonzero().flatten().tolist() for g in range(G)] for b in range(B)]
    assert store.lengths.tolist() == keep.sum(-1).tolist()
    assert not store.complete
    for step in range(21, 24):
        for b in range(B):
            for g in range(G):
                expect_contents(store, b, g, k, v, places[b][g])
                places[b][g].append(step)
        if step == 22:  # several at once: sorted before
            store.append(k[:, :, 22:], v[:, :, 22:])
            assert store.ordered
            break
        store.append(k[:, :, step : step + 1], v[:, :, step : step + 1])
    for b in range(B):
        for g in range(G):
            n = int(store.lengths[b, g])
            assert store.positions[b, g, :n].tolist() == sorted([*places[b][g], 23])


def test_evict_moves_no_more_than_needed() -> None:
    store = filled(9)
    keep = torch.ones(B, G, 9, dtype=torch.bool)
    keep[:, :, 2] = False
    store.evict(keep)
    assert store.positions[0, 0].tolist() == [0, 1, 8, 3, 4, 5, 6, 7]
    assert not store.ordered
    keep = torch.ones(B, G, 8, dtype=torch.bool)
    keep[:, :, 5:] = False
    store = filled(8)
    store.evict(keep)
    assert store.ordered


def test_evict_everything_leaves_no_bytes_and_goes_on() -> None:
    store = filled()
    store.evict(torch.zeros(B, G, 6, dtype=torch.bool))
    assert (len(store), store.nbytes, store.seen.tolist()) == (0, 0, [6, 6])
    k, v = tokens(1)
    store.append(k, v)
    assert bool((store.positions == 6).all())
    assert torch.equal(store.keys, k)


def test_stats_go_with_their_tokens() -> None:
    store = filled(9, stats=("score",))
    assert not bool(store.stat("score").any())
    store.set_stat("score", 10.0 * store.positions)
    keep = torch.ones(B, G, 9, dtype=torch.bool)
    keep[0, 1, ::2] = False
    store.evict(keep)
    store.append(*tokens(1))
    store.sort()
    assert store.stat("score")[0, 1].tolist() == [10.0, 30.0, 50.0, 70.0, *[0.0] * 6]
    assert store.stat("score")[1, 1].tolist() == [*(10.0 * i for i in range(9)), 0.0]


def test_forks_share_pages_until_they_write() -> None:
    store = filled(6)
    page, held = store.nbytes // (2 * B * G), store.nbytes
    other = store.fork()
    assert store.nbytes == held
    k, v = tokens(1, seed=5)
    other.append(k, v)
    assert store.nbytes == held + B * G * page
    assert len(store) == 6
    assert torch.equal(other.keys[:, :, 6:], k)
    assert torch.equal(other.keys[:, :, :6], store.keys)
    keep = torch.ones(B, G, 6, dtype=torch.bool)
    keep[:, :, 0] = False
    before = other.keys
    store.evict(keep)
    assert torch.equal(other.keys, before)
    assert store.positions[0, 0].tolist() == [5, 1, 2, 3, 4]
    del other
    assert store.nbytes == held


def test_select_reorders_beams() -> None:
    k, v = tokens(6)
    store = filled(6)
    beams = store.select(torch.tensor([1, 1, 0]))
    del store
    assert torch.equal(beams.keys, k[[1, 1, 0]])
    new = torch.randn(3, G, 1, D), torch.randn(3, G, 1, E)
    beams.append(*new)
    assert torch.equal(beams.keys, torch.cat([k[[1, 1, 0]], new[0]], 2))
    assert torch.equal(beams.values, torch.cat([v[[1, 1, 0]], new[1]], 2))
    assert beams.seen.tolist() == [7, 7, 7]


def test_crop_forgets_the_last() -> None:
    k, v = tokens(9)
    store = filled(9)
    store.crop(0)
    store.crop(3)
    assert torch.equal(store.keys, k[:, :, :6])
    store.append(k[:, :, 6:], v[:, :, 6:])
    assert torch.equal(store.values, v)
    store.crop(20)
    assert (len(store), store.seen.tolist()) == (0, [0, 0])


def test_merge_is_the_weighted_mean() -> None:
    k, v = tokens(4)
    store = filled(4)
    into = torch.arange(4).expand(B, G, 4).clone()
    into[0, 1] = torch.tensor([0, 0, 2, 0])
    weights = torch.rand(B, G, 4) + 0.1
    merge_slots(store, into, weights)
    assert store.lengths.tolist() == [[4, 2, 4], [4, 4, 4]]
    w = weights[0, 1, [0, 1, 3], None]
    torch.testing.assert_close(store.keys[0, 1, 0], (k[0, 1, [0, 1, 3]] * w).sum(0) / w.sum())
    torch.testing.assert_close(store.values[0, 1, 0], (v[0, 1, [0, 1, 3]] * w).sum(0) / w.sum())
    assert store.positions[0, 1].tolist() == [0, 2, -1, -1]
    expect_contents(store, 1, 1, k, v, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("bits", "normalise"), [(None, False), *((bits, n) for bits in (8, 4, 2) for n in (False, True))]
)
def test_attention_reads_what_is_stored(bits: int | None, normalise: bool) -> None:
    k, v = tokens(13)
    k[..., 1] *= 30
    storage = Storage(bits=bits, page=4, normalise=normalise, zero_point=bits == 4)
    store = KVStore(storage)
    present = torch.ones(B, 13, dtype=torch.bool)
    present[0, :5] = False
    store.append(k, v, present)
    keep = torch.rand(B, G, 13, generator=torch.Generator().manual_seed(1)) < 0.7
    store.evict(keep)
    q = torch.randn(B, 2 * G, 1, D)
    scores = q @ store.keys.repeat_interleave(2, 1).mT * 0.2
    scores = scores.masked_fill(~store.present.repeat_interleave(2, 1)[:, :, None], -torch.inf)
    expected = scores.softmax(-1) @ store.values.repeat_interleave(2, 1)
    out, lse = attend_stored(q, store, scale=0.2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-4, atol=1e-4)
    slots = torch.tensor([2, -1, 0, -1]).expand(B, 2 * G, 4)
    few = scores[..., [2, 0]].softmax(-1) @ store.values[:, :, [2, 0]].repeat_interleave(2, 1)
    torch.testing.assert_close(attend_stored(q, store, slots, scale=0.2).out, few, rtol=1e-4, atol=1e-4)
    if bits == 2:
        with pytest.raises(ValueError, match="expected tokens, in floating point or in codes of 8 or 4 bits"):
            store.pages()


@pytest.mark.parametrize("page", [4, 64])
@pytest.mark.parametrize("dims", [(16, 96), (64, 16), (5, 48), (20, 3)])
def test_listed_tokens_are_copied_whole(dims: tuple[int, int], page: int) -> None:
    """Rows of whole lines of memory, of several, and of none; repeated, in any order, from heads of several pages."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(B, G, 150, dim, generator=generator) for dim in dims)
    store = KVStore(Storage(page=page))
    store.append(k[:, :, :70], v[:, :, :70])
    store.append(k[:, :, 70:], v[:, :, 70:])
    slots = torch.randint(0, 150, (B, 2 * G, 40), generator=generator)
    keys, values = store.gather(slots)
    for x, copied in ((k, keys), (v, values)):
        expected = x.repeat_interleave(2, 1).gather(2, slots[..., None].expand(*slots.shape, x.shape[3]))
        assert torch.equal(copied, expected)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.005), (4, 0.1), (2, 0.45)])
def test_codes_lose_little_and_normalised_channels_less(bits: int, bound: float) -> None:
    k, v = tokens(50)
    store = filled(50, Storage(bits=bits))
    assert float((store.values - v).norm() / v.norm()) < bound
    assert store.slot_nbytes < (D + E) * 4
    wide = k * torch.tensor([40.0, *[1.0] * (D - 1)])
    errors = []
    for normalise in (False, True):
        store = KVStore(Storage(bits=bits, normalise=normalise))
        store.append(wide, v)
        errors.append(float((store.keys - wide)[..., 1:].norm()))
    assert errors[1] < 0.7 * errors[0]


def test_several_queries_are_causal_over_ragged_heads() -> None:
    k, v = tokens(9)
    store = KVStore(PAGES)
    store.append(k[:, :, :6], v[:, :, :6])
    keep = torch.ones(B, G, 6, dtype=torch.bool)
    keep[1, 2, [0, 3]] = False
    store.evict(keep)
    store.append(k[:, :, 6:], v[:, :, 6:])
    q = torch.randn(B, G, 3, D)
    out = attend_stored(q, store).out
    for i in range(3):
        places = [1, 2, 4, 5, *range(6, 7 + i)]
        expected = (q[1, 2, i] @ k[1, 2, places].T * D**-0.5).softmax(0) @ v[1, 2, places]
        torch.testing.assert_close(out[1, 2, i], expected, rtol=1e-4, atol=1e-5)


def test_storage_dtype_is_kept_apart_from_that_of_the_model() -> None:
    store = filled(6, Storage(dtype=torch.bfloat16))
    assert store.slot_nbytes == (D + E) * 2
    assert store.keys.dtype == torch.float32
    assert attend_stored(torch.randn(B, G, 1, D), store).out.dtype == torch.float32


def test_bad_input() -> None:
    store = filled()
    with pytest.raises(ValueError, match=r"keep of shape \(2, 1, 6\), torch.bool: expected \(2, 3, 6\), torch.bool"):
        store.evict(torch.zeros(2, 1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"keep of shape .* torch.int64: expected"):
        store.evict(torch.zeros(2, 3, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"k of shape \(2, 3, 1, 7\).*expected \(2, 3, 1, 8\)"):
        store.append(torch.randn(2, 3, 1, 7), torch.randn(2, 3, 1, E))
    with pytest.raises(ValueError, match=r"v of shape \(2, 3, 2, 5\): expected"):
        store.append(torch.randn(2, 3, 1, 8), torch.randn(2, 3, 2, 5))
    with pytest.raises(ValueError, match=r"present of shape \(2, 3\)"):
        store.append(torch.randn(2, 3, 1, D), torch.randn(2, 3, 1, E), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"name='x': expected one of stats=\(\)"):
        store.set_stat("x", torch.zeros(2, 3, 6))
    with pytest.raises(ValueError, match=r"'x': expected one of stats=\(\)"):
        store.stat("x")
    with pytest.raises(ValueError, match=r"into in \[0, 6\]: expected slots that hold a token"):
        merge_slots(store, torch.tensor([0, 1, 2, 3, 4, 6]).expand(B, G, 6))
    with pytest.raises(ValueError, match="into: expected slots that stay"):
        merge_slots(store, torch.tensor([1, 2, 2, 3, 4, 5]).expand(B, G, 6))
    for options, words in (
        ({"bits": 3}, "bits=3: expected 8, 4, 2, or None"),
        ({"bits": 8, "dtype": torch.float16}, "dtype=torch.float16: expected None together with bits=8"),
        ({"group": 0}, "group=0: expected at least 1 channel"),
        ({"normalise": True}, "normalise=True: expected left alone in floating point"),
        ({"page": 0}, "page=0: expected at least 1 token"),
        ({"dtype": torch.int8}, "dtype=torch.int8: expected a floating-point type or None"),
    ):
        with pytest.raises(ValueError, match=words):
            Storage(**options)
    for bits, words in ((2, "bits=2 with 10 channels: expected a multiple of 4"), (4, "bits=4 with 9 channels")):
        dim = 10 if bits == 2 else 9
        with pytest.raises(ValueError, match=words):
            KVStore(Storage(bits=bits)).append(torch.randn(1, 1, 2, dim), torch.randn(1, 1, 2, dim))
    with pytest.raises(ValueError, match="group=3: expected a divisor of the 8 channels"):
        KVStore(Storage(bits=2, group=3)).append(torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8))
