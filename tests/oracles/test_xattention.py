"""XAttention against the paper's algorithm 1, one antidiagonal at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where.xattention import XAttention
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def random_qkv(batch: int, heads: int, groups: int, queries: int, keys: int, dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = ((batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim + 1))
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return 2 * noise[0], 2 * noise[1], noise[2]


def estimated(q: Tensor, k: Tensor, stride: int, causal: bool) -> list[list[float]]:
    """Softmax over groups of keys of the mean along each antidiagonal; tokens past the end count as zeros."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    offset, result = len(k) - len(q), []
    for a in range(0, len(q), stride):
        row = []
        for b in range(0, len(k), stride):
            pairs = [(a + stride - 1 - t, b + t) for t in range(stride)]
            total = sum(float(scores[i, j]) for i, j in pairs if i < len(q) and j < len(k))
            row.append(-math.inf if causal and b > a + offset else total / stride)
        weights = [math.exp(x) for x in row]
        result.append([w / sum(weights) if sum(weights) else 0.0 for w in weights])
    return result


def oracle_blocks(q: Tensor, k: Tensor, mechanism: XAttention, causal: bool) -> list[list[bool]]:
    """For one head: q `[M, D]`, k `[N, D]`."""
    size, offset = mechanism.block, len(k) - len(q)
    groups = estimated(q, k, mechanism.stride, causal)
    ratio = size // mechanism.stride
    columns = range(-(-len(k) // size))
    result = []
    for i in range(-(-len(q) // size)):
        first, last = i * size + offset, min((i + 1) * size, len(q)) - 1 + offset
        mine = groups[i * ratio : (i + 1) * ratio]
        weights = {j: sum(sum(row[j * ratio : (j + 1) * ratio]) for row in mine) for j in columns}
        visible = [j for j in columns if not causal or j * size <= last]
        past = [j for j in visible if not causal or min((j + 1) * size, len(k)) <= first]
        kept = [j for j in visible if j not in past or (causal and j == 0)]
        total, mass = sum(weights[j] for j in visible), sum(weights[j] for j in kept)
        for j in sorted((j for j in past if j not in kept), key=lambda j: -weights[j]):
            if mass >= mechanism.threshold * total:
                break
            kept.append(j)
            mass += weights[j]
        result.append([j in kept for j in columns])
    return result


def oracle_mask(q: Tensor, k: Tensor, mechanism: XAttention, causal: bool) -> Tensor:
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    mask = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b, h in itertools.product(range(batch), range(heads)):
        blocks = torch.tensor(oracle_blocks(q[b, h], k[b, h * groups // heads], mechanism, causal))
        tokens = blocks.repeat_interleave(mechanism.block, 0).repeat_interleave(mechanism.block, 1)
        mask[b, h] = tokens[:queries, :keys]
    return mask.tril(keys - queries) if causal else mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


SETTINGS = [
    {"threshold": 0.6, "stride": 4, "block": 8},
    {"threshold": 0.9, "stride": 1, "block": 4},
    {"threshold": 0.3, "stride": 3, "block": 6},
    {"threshold": 0.8, "stride": 8, "block": 8},
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 2, 48, 48), (1, 3, 1, 37, 37), (1, 2, 2, 13, 42), (1, 2, 1, 30, 19)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_antidiagonal_selection(settings: dict[str, float], shape: tuple[int, ...], causal: bool) -> None:
    q, k, v = random_qkv(*shape)
    mechanism, geometry = XAttention(**settings), Geometry(causal=causal)
    mask = oracle_mask(q, k, mechanism, causal)
    layout = mechanism.pattern(q, k, geometry)
    layout.validate()
    assert torch.equal(layout.to_dense(), mask)
    torch.testing.assert_close(mechanism(q, k, v, geometry=geometry), attention(q, k, v, mask), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(60, 60), (61, 90), (90, 61), (5, 64), (64, 5)])
def test_single_precision_chooses_as_double_does(queries: int, keys: int) -> None:
    """In fp64 the estimate runs on portable code, in fp32 on the C++ engine where it is there."""
    q, k, _ = random_qkv(1, 4, 2, queries, keys)
    mechanism = XAttention(threshold=0.6, stride=4, block=8)
    exact = mechanism.pattern(q, k, CAUSAL).to_dense()
    assert torch.equal(mechanism.pattern(q.float(), k.float(), CAUSAL).to_dense(), exact)


def test_known_by_hand() -> None:
    """Stride 2: the query pair's antidiagonal meets keys (2, 3) with 9 + 9, every other pair with 0."""
    q = torch.tensor([[3.0, 0.0], [0.0, 3.0]]).view(1, 1, 2, 2)
    k = torch.zeros(1, 1, 8, 2)
    k[0, 0, 2], k[0, 0, 3] = torch.tensor([0.0, 3.0]), torch.tensor([3.0, 0.0])
    layout = XAttention(threshold=0.5, stride=2, block=2).pattern(q, k, Geometry())
    assert layout.block_mask().tolist() == [[[[False, True, False, False]]]]


def test_choice_ignores_later_blocks() -> None:
    q, k, _ = random_qkv(1, 2, 2, 64, 64)
    changed_q, changed_k = q.clone(), k.clone()
    changed_q[:, :, 32:] += 3.0
    changed_k[:, :, 32:] = float("nan")
    mechanism = XAttention(threshold=0.6, stride=4, block=8)
    before = mechanism.pattern(q, k, CAUSAL).to_dense()[:, :, :32]
    assert torch.equal(before, mechanism.pattern(changed_q, changed_k, CAUSAL).to_dense()[:, :, :32])


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 8), (5, 0)])
def test_no_tokens(queries: int, keys: int) -> None:
    q, k, v = random_qkv(1, 2, 1, queries, keys)
    assert torch.equal(XAttention()(q, k, v), torch.zeros(1, 2, queries, 9, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
def test_exact_setting_is_dense(causal: bool) -> None:
    q, k, _ = random_qkv(1, 2, 1, 50, 50)
    layout = XAttention(**XAttention.card.exact(50)).pattern(q, k, Geometry(causal=causal))
    assert layout.density(causal=causal) == 1.0


@pytest.mark.parametrize("tokens", [64, 256])
def test_ladder_rises(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens, tokens)
    kept = [XAttention(**s).pattern(q, k, CAUSAL).density(causal=True) for s in XAttention.card.ladder(tokens)]
    assert all(low < high for low, high in zip(kept, kept[1:], strict=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, r"threshold=0.0: expected a fraction in \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold=1.5: expected a fraction in \(0, 1\]"),
        ({"stride": 0}, "stride=0: expected at least 1 token"),
        ({"block": 24, "stride": 16}, "block=24: expected a positive multiple of stride=16"),
        ({"block": 0}, "block=0: expected a positive multiple of stride=16"),
    ],
)
def test_bad_setting(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XAttention(**settings)
