"""RetrievalAttention against loops over queries, keys and heads that build and search the same index."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache._query_graph import search
from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import Step, compose
from saccade.mechanisms.cache.retrieval_attention import INDEX, RetrievalAttention
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.tiered import TieredStore
from saccade.mechanisms.cache.tiers import Disk
from saccade.ops import KeyGraph

Index = tuple[list[list[int]], list[list[int]], list[int]]


def index_of(queries: list[tuple[int, Tensor]], keys: Tensor, middle: range, degree: int, links: int) -> Index:
    """Keys of each query, queries of each key, entries; a query at a place knows the keys up to there.

    Only keys in the middle are linked: the others are read in any case.
    """
    lists, asked = [], []
    for place, query in queries:
        known = [j for j in middle if j <= place]
        lists.append(sorted(known, key=lambda j: -float(query @ keys[j]))[:degree])  # noqa: B023  used at once
    for j in range(len(keys)):
        who = [i for i, (place, _) in enumerate(queries) if place >= j]
        asked.append(sorted(who, key=lambda i: -float(queries[i][1] @ keys[j]))[:links])  # noqa: B023
    mean = sum(query for _, query in queries) / len(queries)
    entries = sorted(middle, key=lambda j: -float(mean @ keys[j]))[:degree]
    return lists, asked, entries


def found_by(query: Tensor, keys: Tensor, index: Index, width: int, expand: int) -> tuple[list[int], int]:
    """The best `width` keys that a best-first search finds, and how many it reads."""
    lists, asked, entries = index
    seen, done, beam = set(), set(), []
    near = list(entries)
    while True:
        fresh = sorted(set(near) - seen)
        seen |= set(fresh)
        beam = sorted([*beam, *fresh], key=lambda j: -float(query @ keys[j]))[:width]
        chosen = [j for j in beam if j not in done][:expand]
        if not chosen:
            return beam, len(seen)
        done |= set(chosen)
        near = [k for j in chosen for i in asked[j] for k in lists[i]]


def oracle(q: Tensor, k: Tensor, v: Tensor, prompt: int, policy: RetrievalAttention) -> tuple[Tensor, int]:
    """Outputs, and how many keys the searches of the last step read."""
    batch, heads, total, dim = q.shape
    share, reads = heads // k.shape[1], 0
    out = torch.zeros(batch, heads, total, v.shape[3], dtype=q.dtype)
    count = min(prompt, max(1, policy.samples // share))
    places = [i * prompt // count - 1 for i in range(1, count + 1)]
    for b in range(batch):
        for h in range(heads):
            g = h // share
            queries = [(i, q[b, s, i]) for i in places for s in range(g * share, (g + 1) * share)]
            middle = range(policy.sinks, prompt - policy.local)
            index = index_of(queries, k[b, g, :prompt], middle, policy.degree, policy.links)
            for i in range(total):
                seen = list(range(i + 1))
                if i >= prompt:
                    beam, count_read = found_by(q[b, h, i], k[b, g], index, policy.width, policy.expand)
                    seen = [*range(policy.sinks), *beam[: policy.tokens], *range(prompt - policy.local, i + 1)]
                weights = (k[b, g, seen] @ q[b, h, i] / math.sqrt(dim)).softmax(0)
                out[b, h, i] = weights @ v[b, g, seen]
            reads += count_read
    return out, reads


def inputs(heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 5))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def steps(policy, q: Tensor, k: Tensor, v: Tensor, sizes: list[int]) -> tuple[Tensor, CachedAttention]:
    layer = CachedAttention(policy)
    parts = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    return torch.cat([layer(*part) for part in parts], 2), layer


@pytest.mark.parametrize(
    ("heads", "groups", "policy", "prompt"),
    [
        (4, 2, RetrievalAttention(4, 1, 3, width=5, samples=12, degree=3, links=2, expand=2), 32),
        (2, 2, RetrievalAttention(2, 0, 0, width=2, samples=50, degree=2, links=1, expand=1), 30),
        (3, 1, RetrievalAttention(6, 2, 4, width=9, samples=9, degree=4, links=3, expand=4), 33),
    ],
)
def test_matches_the_oracle(heads: int, groups: int, policy: RetrievalAttention, prompt: int) -> None:
    q, k, v = inputs(heads, groups, 36)
    out, layer = steps(policy, q, k, v, [prompt] + [1] * (36 - prompt))
    expected, reads = oracle(q, k, v, prompt, policy)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert 0 < reads < 2 * heads * 36
    key, token = 8 * 8, (8 + 5) * 8
    chosen = layer.policy.read(q[:, :, -1:], layer.kept, layer.step)
    attended = int((chosen.indices >= 0).sum()) * token
    numbers = layer.bytes_read - attended - reads * key  # of the index
    assert numbers > 0
    assert numbers % 4 == 0


def test_a_wide_search_finds_the_best_of_what_is_linked() -> None:
    """With all queries, keys and links the index holds everything, and the best keys are found exactly."""
    q, k, v = inputs(2, 1, 30)
    policy = RetrievalAttention(5, 0, 1, width=29, samples=100, degree=29, links=58, expand=8)
    _, layer = steps(policy, q[:, :, :29], k[:, :, :29], v[:, :, :29], [29])
    layer.kept.append(k[:, :, 29:], v[:, :, 29:])
    chosen = layer.policy.read(q[:, :, 29:], layer.kept, layer.step).indices[:, :, 0]
    for b in range(2):
        for h in range(2):
            best = (k[b, 0, :28] @ q[b, h, 29]).topk(5).indices.tolist()
            assert sorted(j for j in chosen[b, h].tolist() if j >= 0) == sorted([*best, 28, 29])


@pytest.mark.parametrize(
    "storage",
    [
        Storage(), Storage(dtype=torch.bfloat16, page=7), Storage(bits=8, normalise=True), Storage(bits=4, group=16),
        Storage(bits=2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tiered", [False, True])
def test_every_form_of_storage_is_searched_alike(storage: Storage, tiered: bool, tmp_path: Path) -> None:
    """In place by the engine or copied by PyTorch; of 3 query heads a key/value head each has its own search."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 200, 32, generator=generator) for heads in (6, 2, 2))
    store = TieredStore(Disk(tmp_path, resident=0.3), storage) if tiered else KVStore(storage)
    store.append(k, v)
    policy = RetrievalAttention(20, 3, 10, width=30, samples=60, degree=8, links=2, expand=7)
    policy.settle(q, store, Step())
    graph = KeyGraph(*(store.derived[INDEX].tensors[name] for name in KeyGraph._fields))
    listed = {int(j) for x in (graph.lists, graph.entries) for j in x.unique()} - {-1}
    assert listed <= set(range(3, 190))
    assert len(listed) > 150
    found, read = [], []
    for impl in ("auto", "eager"):
        step = Step()
        found.append(search(q[:, :, -1:], store, graph, policy.width, policy.expand, step, impl=impl))
        read.append(step.choosing)
    assert torch.equal(found[0], found[1])
    assert read[0] == read[1] > 0
    best = (q[:, :, -1:] @ store.keys.repeat_interleave(3, 1)[:, :, 3:190].mT)[:, :, 0].topk(20).indices + 3
    recall = (best[..., None] == found[0][:, :, None]).any(-1).float().mean()
    assert recall > 0.6  # of 187 random keys 20 are the best: 30 kept at random would hold a sixth of them


def test_left_padded_equals_alone_and_so_do_chunks() -> None:
    q, k, v = inputs(2, 1, 30)
    present = torch.ones(2, 24, dtype=torch.bool)
    present[1, :7] = False
    policy = RetrievalAttention(3, 1, 2, width=4, samples=8, degree=3, links=2, expand=2)
    padded, alone = CachedAttention(policy), CachedAttention(policy)
    for cut in (slice(0, 15), slice(15, 24)):
        padded(*(x[:, :, cut] for x in (q, k, v)), present=present[:, cut])
    for cut in (slice(7, 15), slice(15, 24)):
        alone(*(x[1:, :, cut] for x in (q, k, v)))
    for i in range(24, 30):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        torch.testing.assert_close(padded(*token)[1:], alone(*(x[1:] for x in token)), rtol=0, atol=1e-12)
    assert padded.bytes_read < 2 * 2 * 30 * (8 + 5) * 8


def test_without_an_index_everything_is_read() -> None:
    """A sequence that begins with single tokens, and one whose slots move."""
    q, k, v = inputs(2, 2, 26)
    policy = RetrievalAttention(2, 1, 2, width=2, degree=2)
    out, _ = steps(policy, q, k, v, [1] * 26)
    expected, _ = steps(compose(), q, k, v, [1] * 26)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    keep = SinkRecent(sinks=2, recent=9)
    out, _ = steps(compose(keep=keep, read=policy), q, k, v, [5] + [1] * 21)
    expected, _ = steps(keep, q, k, v, [5] + [1] * 21)
    torch.testing.assert_close(out[:, :, 10:], expected[:, :, 10:], rtol=0, atol=1e-12)


def test_bad_settings() -> None:
    for name in ("tokens", "width", "samples", "degree", "links", "expand"):
        with pytest.raises(ValueError, match=f"{name}=0: expected at least 1"):
            RetrievalAttention(**{name: 0})
    for name in ("sinks", "local"):
        with pytest.raises(ValueError, match=f"{name}=-1: expected at least 0 tokens"):
            RetrievalAttention(**{name: -1})
    with pytest.raises(ValueError, match="dense_layers=-1: expected at least 0 layers"):
        RetrievalAttention(dense_layers=-1)
