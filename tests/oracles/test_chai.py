"""CHAI against plain loops: clusters from all pairs of members, scores one query and one key at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import Everything, Step, compose, evict_after
from saccade.mechanisms.cache.chai import Chai, elbow, linkages
from saccade.mechanisms.cache.reading import attend_stored
from saccade.mechanisms.cache.sharing import SharedKeyStore
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.cache.storage import Storage

pytestmark = pytest.mark.quick


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(s - max(scores)) for s in scores]
    return [p / sum(powers) for p in powers]


def row(q: Tensor, k: Tensor, i: int) -> list[float]:
    """Weights of query i `[N, D]` over keys 0 .. i."""
    return softmax([sum(float(x) * float(y) for x, y in zip(q[i], k[j], strict=True)) / math.sqrt(q.shape[1])
                    for j in range(i + 1)])  # fmt: skip


def cosine_distance(x: list[float], y: list[float]) -> float:
    inner = sum(a * b for a, b in zip(x, y, strict=True))
    return 1 - inner / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def grouped(features: list[list[float]], count: int) -> list[list[int]]:
    """Average linkage: join the two clusters whose members are nearest on average, until `count` are left."""
    clusters = [[head] for head in range(len(features))]
    while len(clusters) > count:
        best = (math.inf, 0, 0)
        for i in range(len(clusters)):
            for j in range(i + 1, len(clusters)):
                pairs = [cosine_distance(features[a], features[b]) for a in clusters[i] for b in clusters[j]]
                best = min(best, (sum(pairs) / len(pairs), i, j))
        _, i, j = best
        clusters[i] += clusters.pop(j)
    return clusters


def oracle(q: Tensor, k: Tensor, v: Tensor, count: int, warmup: int) -> tuple[Tensor, list[list[list[int]]]]:
    """One sequence and head after the other: `[B, H, N, E]`, and the clusters of each sequence."""
    batch, heads, tokens, _ = q.shape
    groups = k.shape[1]
    share = heads // groups
    out, found = torch.zeros(batch, heads, tokens, v.shape[3], dtype=q.dtype), []
    for b in range(batch):
        early = [[] for _ in range(groups)]  # type: list[list[float]]
        for h in range(heads):
            for i in range(warmup):
                early[h // share] += row(q[b, h], k[b, h // share], i) + [0.0] * (warmup - 1 - i)
        clusters = grouped(early, count)
        found.append(clusters)
        leader = {head: min(cluster) for cluster in clusters for head in cluster}
        for h in range(heads):
            group = h // share
            for i in range(tokens):
                lead = group if i < warmup else leader[group]
                weights = row(q[b, lead * share + h % share], k[b, lead], i)
                out[b, h, i] = sum(w * v[b, group, j] for j, w in enumerate(weights))
    return out, found


def inputs(batch: int, heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, 8), (batch, groups, tokens, 8), (batch, groups, tokens, 12))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


CASES = [
    (6, 6, 2, 5, [14]),  # the paper's: as many keys as queries
    (6, 6, 3, 5, [2, 2, 9, 1, 1, 1, 4]),
    (4, 4, 1, 3, [1] * 12),
    (8, 4, 2, 5, [13, 1, 1, 1]),
    (9, 3, 2, 4, [3, 8, 1, 1]),
    (6, 6, 6, 5, [11, 1, 1]),
]


@pytest.mark.parametrize(("heads", "groups", "count", "warmup", "chunks"), CASES)
def test_oracle(heads: int, groups: int, count: int, warmup: int, chunks: list[int]) -> None:
    q, k, v = inputs(2, heads, groups, sum(chunks))
    expected, clusters = oracle(q, k, v, count, warmup)
    layer = CachedAttention(Chai(heads=count / groups, warmup=warmup))
    pieces = zip(*(x.split(chunks, 2) for x in (q, k, v)), strict=True)
    out = torch.cat([layer(*piece) for piece in pieces], 2)
    torch.testing.assert_close(out, expected)
    store = layer.kept
    assert isinstance(store, SharedKeyStore)
    for b, found in enumerate(clusters):
        assert {min(c) for c in found} == set(store.table.leader[b].tolist())
        kept = (store.table.keys.lengths[b] > 0).nonzero().flatten().tolist()
        assert kept == sorted(min(c) for c in found)
    assert store.table.keys.arena.pages == 2 * count
    torch.testing.assert_close(store.values, v)


def test_by_hand() -> None:
    """Heads 0 and 2 look at the first token, 1 and 3 at their own: two clusters, led by 0 and 1."""
    tokens = torch.eye(8, dtype=torch.float64)
    first = torch.zeros(8, 8, dtype=torch.float64)
    first[:, 0] = 20.0
    q = torch.stack([first, 20 * tokens, first, 20 * tokens])[None] * math.sqrt(8)
    k, v = tokens.expand(1, 4, 8, 8), torch.arange(32, dtype=torch.float64).view(1, 4, 8, 1)
    layer = CachedAttention(Chai(heads=0.5))
    layer(q[:, :, :7], k[:, :, :7], v[:, :, :7])
    out = layer(q[:, :, 7:], k[:, :, 7:], v[:, :, 7:])
    assert layer.kept.table.leader.tolist() == [[0, 1, 0, 1]]  # type: ignore[attr-defined]
    torch.testing.assert_close(
        out.flatten(), torch.tensor([0.0, 15.0, 16.0, 31.0], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_bytes_of_keys_are_freed_and_stay_free() -> None:
    """Of 8 heads 2 keep keys: a quarter of the keys' pages, and all of the values'."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 1024, 16, generator=generator) for _ in range(3))
    held = {}
    for policy in (Everything(), Chai(heads=0.25)):
        layer = CachedAttention(policy)
        for piece in zip(*(x.split((640, 1, 255, 128), 2) for x in (q, k, v)), strict=True):
            layer(*piece)
        held[policy] = layer.nbytes
    shared, whole = held[Chai(heads=0.25)], held[Everything()]
    positions = 8 * 1024 * 4
    assert whole == 2 * v.nbytes + positions
    assert shared == v.nbytes + v.nbytes // 4 + positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_reads_in_place_what_eager_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, 300, 64, generator=generator).to(dtype) for n in (12, 6, 6))
    outs = []
    for impl in ("auto", "eager"):
        layer = CachedAttention(Chai(heads=0.5))
        layer(*(x[:, :, :200] for x in (q, k, v)), impl=impl)
        outs.append(torch.cat([layer(*(x[:, :, i : i + 20] for x in (q, k, v)), impl=impl) for i in range(200, 300, 20)]
                              + [layer(*(x[:, :, :1] for x in (q, k, v)), impl=impl)], 2))  # fmt: skip
    loose = {torch.float32: 1e-5, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}[
        dtype
    ]  # of weights rounded to it
    torch.testing.assert_close(*outs, atol=loose, rtol=1e-2)


def test_fork_crop_and_reorder() -> None:
    q, k, v = inputs(2, 4, 4, 24)
    expected, _ = oracle(q, k, v, 2, 5)
    layer = CachedAttention(Chai(heads=0.5))
    layer(*(x[:, :, :20] for x in (q, k, v)))
    whole = layer.kept
    fork, swapped = whole.fork(), whole.select(torch.tensor([1, 0, 1]))
    junk = torch.full_like(k[:, :, :1], 9.0)
    layer.kept = fork
    layer(q[:, :, 20:21], junk, torch.full_like(v[:, :, :1], 9.0))
    fork.crop(1)
    for store, rows in ((fork, [0, 1]), (swapped, [1, 0, 1]), (whole, [0, 1])):
        layer.kept = store
        out = layer(*(x[rows, :, 20:] for x in (q, k, v)))
        torch.testing.assert_close(out, expected[rows, :, 20:])
    fork.crop(2)
    assert len(fork) == 22


def test_cropped_first_tokens_come_again() -> None:
    """Tokens taken back before clusters are formed do not count for them."""
    q, k, v = inputs(1, 4, 4, 12)
    expected, _ = oracle(q, k, v, 2, 5)
    layer = CachedAttention(Chai(heads=0.5))
    layer(*(x[:, :, :2] for x in (q, k, v)))
    layer(*(x[:, :, :2].flip(1) for x in (q, k, v)))
    layer.kept.crop(2)
    out = torch.cat([layer(*(x[:, :, 2:8] for x in (q, k, v))), layer(*(x[:, :, 8:] for x in (q, k, v)))], 2)
    torch.testing.assert_close(out, expected[:, :, 2:])


@pytest.mark.parametrize("sizes", [[9, 1], [2, 3, 5], [1] * 10])
def test_prompts_attended_elsewhere_form_the_same_clusters(sizes: list[int]) -> None:
    """As where a recipe's prefill is sparse: the policy sees queries and keys after the attention only."""
    q, k, v = inputs(2, 6, 6, 10)
    expected, clusters = oracle(q, k, v, 3, 5)
    policy = Chai(heads=0.5)
    store = policy.store()
    for piece in zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True):
        store.append(*piece[1:])
        evict_after(policy, piece[0], store, Step())
    assert store.table.leader.tolist() == [
        [next(min(c) for c in found if h in c) for h in range(6)] for found in clusters
    ]
    assert store.table.keys.arena.pages == 6
    torch.testing.assert_close(attend_stored(q[:, :, -1:], store).out, expected[:, :, -1:])


def test_elbow() -> None:
    """Six heads of two kinds bear two clusters; heads that are all alike, or all apart, are not told apart."""
    kinds = torch.eye(5, dtype=torch.float64)[[0, 1]] * 0.9 + 0.02
    noise = torch.randn(1, 6, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
    weights = kinds[[0, 1, 1, 0, 1, 0]][None, :, None].expand(1, 6, 5, 5) + noise
    assert elbow(weights, heads=6) == 2 / 6
    assert elbow(torch.full((1, 4, 3, 3), 1 / 3), heads=4) == 1.0
    assert elbow(weights[:, :2], heads=1) == 1.0
    with pytest.raises(ValueError, match=r"heads=4: expected a divisor of 6"):
        elbow(weights, heads=4)
    with pytest.raises(ValueError, match=r"weights=\(6, 5, 5\): expected \[S, H, W, W\]"):
        elbow(weights[0], heads=6)


def test_linkages_are_those_of_loops() -> None:
    features = torch.rand(3, 7, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for count, leader in linkages(features):
        for one, mine in zip(features, leader.tolist(), strict=True):
            clusters = grouped(one.tolist(), count)
            assert mine == [next(min(c) for c in clusters if head in c) for head in range(7)]


def test_refusals() -> None:
    for settings, message in (({"heads": 0.0}, r"heads=0.0: expected above 0"), ({"warmup": 1}, r"warmup=1: expected")):
        with pytest.raises(ValueError, match=message):
            Chai(**settings)
    with pytest.raises(ValueError, match="expected no policy that evicts or selects beside"):
        compose(keep=SinkRecent(), store=Chai())
    with pytest.raises(ValueError, match="expected a policy that works on any store"):
        compose(keep=Chai(), store=Storage(bits=8))
    q, k, v = inputs(1, 4, 4, 9)
    layer = CachedAttention(Chai(heads=0.5))
    layer(q, k, v)
    keep = torch.ones(1, 4, 9, dtype=torch.bool)
    keep[0, -1, 3] = keep[0, 0, 4] = False
    with pytest.raises(ValueError, match="the same tokens in all heads that share keys"):
        layer.kept.evict(keep)
