"""LOOK-M against a dictionary of tokens per head, from the paper's three equations of merging."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.look_m import LookM
from saccade.mechanisms.cache.merging import nearest_kept
from saccade.mechanisms.cache.store import KVStore

pytestmark = pytest.mark.quick

RULES = ("averaged", "pivotal", "weighted")


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def merged(rule: str, own: Tensor, guests: list[tuple[float, Tensor]]) -> Tensor:
    """One vector of a kept token, and those that come to it with their cosine."""
    n = len(guests)
    if rule == "averaged":
        return (own + sum(x for _, x in guests)) / (n + 1)
    if rule == "pivotal":
        return (own + sum((x + own) / 2 for _, x in guests)) / (n + 1)
    return (own + sum(c * x for c, x in guests)) / (n + 1)


def oracle(q: Tensor, k: Tensor, v: Tensor, chunks: list[int], setting: dict) -> tuple[Tensor, dict]:
    """The cache of a head is a dict: position -> [key, value, accumulated attention]."""
    batch, heads, tokens, dim = q.shape
    share = heads // k.shape[1]
    out, caches = torch.zeros(batch, heads, tokens, v.shape[3], dtype=q.dtype), {}
    for b in range(batch):
        for g in range(k.shape[1]):
            cache: dict[int, list] = {}
            start = 0
            for size in chunks:
                for i in range(start, start + size):
                    cache[i] = [k[b, g, i], v[b, g, i], 0.0]
                for i in range(start, start + size):
                    seen = [j for j in sorted(cache) if j <= i]
                    for h in range(g * share, (g + 1) * share):
                        weights = [math.exp(float(q[b, h, i] @ cache[j][0]) / math.sqrt(dim)) for j in seen]
                        for j, weight in zip(seen, weights, strict=True):
                            cache[j][2] += weight / sum(weights)
                            out[b, h, i] += weight / sum(weights) * cache[j][1]
                start += size
                cache = compress(cache, **setting)
            caches[b, g] = cache
    return out, caches


def compress(cache: dict[int, list], heavy: int, recent: int, sinks: int, rule: str) -> dict[int, list]:
    if len(cache) <= heavy + recent:
        return cache
    order = sorted(cache)
    old, new = order[: len(order) - recent], order[len(order) - recent :]
    ranked = sorted(old, key=lambda j: (j >= sinks, -cache[j][2], j))
    kept = sorted(ranked[:heavy]) + new
    guests = defaultdict(list)
    for e in ranked[heavy:]:
        target = max(kept, key=lambda c: cosine(cache[e][0], cache[c][0]))
        guests[target].append((cosine(cache[e][0], cache[target][0]), e))
    result = {}
    for c in kept:
        pairs = [[merged(rule, cache[c][part], [(w, cache[e][part]) for w, e in guests[c]])] for part in (0, 1)]
        result[c] = [pairs[0][0], pairs[1][0], cache[c][2]]
    return result


def inputs(batch: int, heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, 8), (batch, groups, tokens, 8), (batch, groups, tokens, 5))
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("heads", "groups", "chunks", "heavy", "recent", "sinks"),
    [
        (2, 2, [1] * 17, 4, 4, 2),
        (4, 2, [9, 1, 1, 1, 1, 1, 3, 1], 3, 4, 0),
        (6, 1, [13, 1, 1], 5, 0, 4),
        (2, 1, [7, 6, 1, 1], 0, 3, 4),
        (2, 2, [8, 1, 1], 4, 40, 4),
    ],
)
def test_matches_the_oracle(
    rule: str, heads: int, groups: int, chunks: list[int], heavy: int, recent: int, sinks: int
) -> None:
    q, k, v = inputs(2, heads, groups, sum(chunks))
    setting = {"heavy": heavy, "recent": recent, "sinks": sinks, "rule": rule}
    expected, caches = oracle(q, k, v, chunks, setting)
    layer = CachedAttention(LookM(**setting))
    parts = zip(q.split(chunks, 2), k.split(chunks, 2), v.split(chunks, 2), strict=True)
    out = torch.cat([layer(*part) for part in parts], 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    layer.kept.sort()
    for (b, g), cache in caches.items():
        assert layer.kept.positions[b, g].tolist() == sorted(cache)
        for name, part in (("keys", 0), ("values", 1)):
            wanted = torch.stack([cache[j][part] for j in sorted(cache)])
            torch.testing.assert_close(getattr(layer.kept, name)[b, g], wanted, rtol=0, atol=1e-10)
        attention = torch.tensor([cache[j][2] for j in sorted(cache)], dtype=torch.float64)
        torch.testing.assert_close(layer.kept.stat("attention")[b, g], attention, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rule", "value"), [("averaged", 4.0), ("pivotal", 3.0), ("weighted", 4.0)])
def test_by_hand(rule: str, value: float) -> None:
    """Tokens 0 and 2 have one key, tokens 1 and 3 another; 0 and 1 go, each into its like, with cosine 1."""
    k = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]], dtype=torch.float64).view(1, 1, 4, 2)
    v = torch.tensor([6.0, 10, 2, 20], dtype=torch.float64).view(1, 1, 4, 1)
    layer = CachedAttention(LookM(heavy=0, recent=2, sinks=0, rule=rule))
    layer(torch.zeros_like(k), k, v)
    assert layer.kept.positions.flatten().tolist() == [2, 3]
    assert layer.kept.values[0, 0, 0].item() == value
    assert torch.equal(layer.kept.keys, k[:, :, 2:])


def test_merging_beats_evicting_where_keys_repeat() -> None:
    """A token goes whose twin stays: merged, the twin answers with the mean; evicted, with its own value alone."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(1, 1, 8, 16, generator=generator, dtype=torch.float64)
    k, v = torch.cat([half, half], 2), torch.randn(1, 1, 16, 4, generator=generator, dtype=torch.float64)
    layer = CachedAttention(LookM(heavy=0, recent=8, sinks=0, rule="averaged"))
    layer(torch.zeros_like(k), k, v)
    query = 3 * torch.randn(1, 1, 1, 16, generator=generator, dtype=torch.float64)
    scores = (query @ k.mT) / 4
    dense = scores.softmax(-1) @ v
    kept = (query @ layer.kept.keys.mT / 4).softmax(-1) @ layer.kept.values
    torch.testing.assert_close(kept, dense, rtol=0, atol=1e-12)
    evicted = scores[..., 8:].softmax(-1) @ v[:, :, 8:]
    assert float((evicted - dense).abs().max()) > 0.1


def test_memory_is_freed_and_stays_bounded() -> None:
    q, k, v = inputs(1, 2, 2, 130)
    layer = CachedAttention(LookM(heavy=3, recent=2))
    page = 64 * (8 + 5 + 2) * 8 + 64 * 4
    layer(q[:, :, :120], k[:, :, :120], v[:, :, :120])
    assert layer.nbytes == 2 * page
    for i in range(120, 130):
        layer(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1])
        assert layer.nbytes == 2 * page
        assert layer.kept.lengths.tolist() == [[5, 5]]


def test_nearest_in_chunks_and_ragged_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    k = inputs(2, 2, 2, 40)[1]
    store = KVStore()
    store.append(k, k, torch.arange(40).expand(2, 40) >= torch.tensor([[0], [9]]))
    kept = torch.rand(2, 2, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    whole = nearest_kept(store, kept)
    monkeypatch.setattr("saccade.mechanisms.cache.merging.SCORE_ELEMENTS", 100)
    chunked = nearest_kept(store, kept)
    assert torch.equal(whole[0], chunked[0])
    torch.testing.assert_close(whole[1], chunked[1], rtol=0, atol=1e-14)
    for b in range(2):
        for g in range(2):
            length = int(store.lengths[b, g])
            for j in range(length):
                stay = [c for c in range(length) if kept[b, g, c]]
                wanted = max(stay, key=lambda c: cosine(store.keys[b, g, j], store.keys[b, g, c]))  # noqa: B023
                assert int(whole[0][b, g, j]) == (j if kept[b, g, j] else wanted)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="heavy=-1: expected at least 0 tokens"):
        LookM(heavy=-1)
    with pytest.raises(ValueError, match="recent=-2: expected at least 0 tokens"):
        LookM(recent=-2)
    with pytest.raises(ValueError, match=r"heavy \+ recent=0: expected at least 1 token"):
        LookM(heavy=0, recent=0)
    with pytest.raises(ValueError, match="sinks=-1: expected at least 0 tokens"):
        LookM(sinks=-1)
    with pytest.raises(ValueError, match="rule='sum': expected 'averaged', 'pivotal' or 'weighted'"):
        LookM(rule="sum")  # type: ignore[arg-type]
    store = KVStore()
    store.append(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    with pytest.raises(ValueError, match=r"kept in heads with \[\[0\]\] slots that stay: expected at least one"):
        nearest_kept(store, torch.zeros(1, 1, 3, dtype=torch.bool))
