"""SpargeAttn's first stage against section 3.3 of the paper, block by block."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where.sparge import Sparge
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def correlated_qkv(batch: int, heads: int, groups: int, queries: int, keys: int, dim: int = 8) -> tuple[Tensor, ...]:
    """Random walks around a common direction, so that some blocks are self-similar and some are not."""
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = ((batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim + 1))
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return (0.3 * noise[0].cumsum(2), 0.3 * noise[1].cumsum(2), noise[2])


def self_similarity(x: Tensor) -> float:
    """Mean of all entries of the matrix of cosines."""
    unit = x / x.norm(dim=1, keepdim=True)
    return float((unit @ unit.T).mean())


def oracle_blocks(q: Tensor, k: Tensor, mechanism: Sparge, causal: bool) -> list[list[bool]]:
    """For one head: q `[M, D]`, k `[N, D]`."""
    size_q, size_k = mechanism.block_q, mechanism.block_k
    offset = len(k) - len(q)
    q_blocks = [q[i : i + size_q] for i in range(0, len(q), size_q)]
    k_blocks = [k[j : j + size_k] for j in range(0, len(k), size_k)]
    similar_k = [self_similarity(x) > mechanism.similarity for x in k_blocks]
    result = []
    for i, rows in enumerate(q_blocks):
        first = i * size_q + offset
        past = [not causal or j * size_k + len(x) <= first for j, x in enumerate(k_blocks)]
        edge = [not past[j] and j * size_k <= first + len(rows) - 1 for j in range(len(k_blocks))]
        scored = [j for j in range(len(k_blocks)) if past[j] and similar_k[j]]
        weights = [math.exp(float(rows.mean(0) @ k_blocks[j].mean(0)) / math.sqrt(q.shape[1])) for j in scored]
        falling = sorted(range(len(scored)), key=lambda n: -weights[n])
        if mechanism.topk is None:
            cumulated = itertools.accumulate(weights[n] / sum(weights) for n in falling)
            count = max(1, sum(mass <= mechanism.cdf for mass in cumulated))
        else:
            count = max(1, int(mechanism.topk * len(k_blocks)))
        kept = {scored[n] for n in falling[:count]}
        whole = self_similarity(rows) <= mechanism.similarity
        sink = [mechanism.sink and j == 0 for j in range(len(k_blocks))]
        result.append(
            [edge[j] or (past[j] and (j in kept or whole or not similar_k[j] or sink[j])) for j in range(len(k_blocks))]
        )
    return result


def oracle_mask(q: Tensor, k: Tensor, mechanism: Sparge, causal: bool) -> Tensor:
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    mask = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b, h in itertools.product(range(batch), range(heads)):
        blocks = torch.tensor(oracle_blocks(q[b, h], k[b, h * groups // heads], mechanism, causal))
        tokens = blocks.repeat_interleave(mechanism.block_q, 0).repeat_interleave(mechanism.block_k, 1)
        mask[b, h] = tokens[:queries, :keys]
    return mask.tril(keys - queries) if causal else mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


SETTINGS = [
    {"cdf": 0.7, "similarity": 0.6, "block_q": 8, "block_k": 4},
    {"cdf": 0.9, "similarity": 0.85, "block_q": 6, "block_k": 5},
    {"cdf": 0.3, "similarity": -1.0, "block_q": 8, "block_k": 4, "sink": True},
    {"topk": 0.25, "similarity": 0.3, "block_q": 8, "block_k": 4},
    {"topk": 0.01, "similarity": -1.0, "block_q": 4, "block_k": 8},
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 2, 48, 48), (1, 3, 1, 37, 37), (1, 2, 2, 21, 50), (1, 2, 1, 30, 19)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_first_stage(settings: dict[str, float], shape: tuple[int, ...], causal: bool) -> None:
    q, k, v = correlated_qkv(*shape)
    mechanism, geometry = Sparge(**settings), Geometry(causal=causal)
    mask = oracle_mask(q, k, mechanism, causal)
    layout = mechanism.pattern(q, k, geometry)
    layout.validate()
    assert torch.equal(layout.to_dense(), mask)
    torch.testing.assert_close(mechanism(q, k, v, geometry=geometry), attention(q, k, v, mask), atol=1e-10, rtol=0)


def test_known_by_hand() -> None:
    """Keys 0 and 1 point apart (self-similarity 0): kept. Of the others, the block along the query holds the mass."""
    k = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [-4.0, 0.0], [-4.0, 0.0]]).view(1, 1, 6, 2)
    q = torch.tensor([[4.0, 0.0]]).expand(1, 1, 2, 2)
    layout = Sparge(cdf=0.9, similarity=0.5, block_q=2, block_k=2).pattern(q, k, Geometry())
    assert layout.block_mask().tolist() == [[[[True, True, False]]]]


def test_choice_ignores_later_blocks() -> None:
    q, k, _ = correlated_qkv(1, 2, 2, 64, 64)
    changed_q, changed_k = q.clone(), k.clone()
    changed_q[:, :, 32:] += 3.0
    changed_k[:, :, 32:] = float("nan")
    mechanism = Sparge(cdf=0.5, similarity=0.3, block_q=8, block_k=4)
    before = mechanism.pattern(q, k, CAUSAL).to_dense()[:, :, :32]
    assert torch.equal(before, mechanism.pattern(changed_q, changed_k, CAUSAL).to_dense()[:, :, :32])


def test_grid_of_another_size_is_refused() -> None:
    q, k, v = correlated_qkv(1, 2, 1, 30, 30)
    with pytest.raises(
        ValueError, match=r"grid=\(4, 8\) with prefix=0, suffix=0: expected 32 queries and keys, got 30"
    ):
        Sparge()(q, k, v, geometry=Geometry(grid=(4, 8)))


@pytest.mark.parametrize("causal", [False, True])
def test_exact_setting_is_dense(causal: bool) -> None:
    q, k, _ = correlated_qkv(1, 2, 1, 50, 50)
    layout = Sparge(**Sparge.card.exact(50)).pattern(q, k, Geometry(causal=causal))
    assert layout.density(causal=causal) == 1.0


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 8), (5, 0)])
def test_no_tokens(queries: int, keys: int) -> None:
    q, k, v = correlated_qkv(1, 2, 1, queries, keys)
    out = Sparge()(q, k, v, geometry=Geometry())
    assert torch.equal(out, torch.zeros(1, 2, queries, 9, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [64, 256])
def test_ladder_rises(tokens: int) -> None:
    q, k, _ = correlated_qkv(1, 2, 1, tokens, tokens)
    kept = [Sparge(**s).pattern(q, k, CAUSAL).density(causal=True) for s in Sparge.card.ladder(tokens)]
    assert all(low < high for low, high in zip(kept, kept[1:], strict=False))
    assert 0.05 < kept[0] < kept[-1] < 0.6


@pytest.mark.parametrize(
    ("name", "value"),
    [("cdf", 0.0), ("cdf", 1.5), ("topk", 0.0), ("topk", 2.0), ("similarity", -1.5), ("block_q", 0), ("block_k", 0)],
)
def test_bad_setting(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        Sparge(**{name: value})


def test_segments_are_refused() -> None:
    q, k, v = correlated_qkv(1, 2, 1, 16, 16)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="q_segments: sparge does not support"):
        Sparge()(q, k, v, geometry=Geometry(q_segments=ids, kv_segments=ids))
