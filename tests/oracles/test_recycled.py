"""Recycled Attention against loops over sequences, heads and steps that keep lists of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import compose
from saccade.mechanisms.cache.recycled import Recycled
from saccade.mechanisms.cache.sink_recent import SinkRecent


def ranking(queries: Tensor, keys: Tensor, kernel: int) -> list[int]:
    """Tokens by the greatest softmax weight that one of the queries `[S, D]` gives them or a neighbour, best first."""
    weights = [(keys @ query / math.sqrt(len(query))).softmax(0) for query in queries]
    greatest = [max(float(row[j]) for row in weights) for j in range(len(keys))]
    reach = kernel // 2
    pooled = [max(greatest[max(0, j - reach) : j + reach + 1]) for j in range(len(keys))]
    return sorted(range(len(keys)), key=lambda j: -pooled[j])


def alike(a: Tensor, b: Tensor) -> float:
    """Cosine of the means over heads."""
    x, y = sum(a) / len(a), sum(b) / len(b)
    return float(x @ y / x.norm() / y.norm())


def oracle(q: Tensor, k: Tensor, v: Tensor, prompt: int, policy: Recycled) -> tuple[Tensor, list[list[int]]]:
    """Outputs, and the full steps of each sequence."""
    batch, heads, total, dim = q.shape
    groups = k.shape[1]
    share = heads // groups
    out, full = torch.zeros(batch, heads, total, v.shape[3], dtype=q.dtype), [[] for _ in range(batch)]
    for b in range(batch):
        lists, since, asked = [[] for _ in range(groups)], 0, q[b, :, prompt - 1]
        for i in range(total):
            everything = i < prompt
            if not everything:
                since += 1
                everything = since % policy.stride == 0
                if everything and policy.similarity is not None:
                    everything = alike(q[b, :, i], asked) < policy.similarity
            for g in range(groups):
                if not everything:  # the new token joins; the last of those from the full step, else the oldest, goes
                    lists[g] = [*lists[g], i]
                    if len(lists[g]) > policy.tokens:
                        ranked = len(lists[g]) - since
                        del lists[g][ranked - 1 if ranked > 0 else 0]
                for h in range(g * share, (g + 1) * share):
                    seen = list(range(i + 1)) if everything else lists[g]
                    weights = (k[b, g, seen] @ q[b, h, i] / math.sqrt(dim)).softmax(0)
                    out[b, h, i] = weights @ v[b, g, seen]
            if everything and i >= prompt - 1:
                if i >= prompt:
                    full[b].append(i)
                since, asked = 0, q[b, :, i]
                for g in range(groups):
                    best = ranking(q[b, g * share : (g + 1) * share, i], k[b, g, : i + 1], policy.kernel)
                    lists[g] = best[: policy.tokens]
    return out, full


def inputs(heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 5))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def steps(policy, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> tuple[Tensor, CachedAttention, list[int]]:
    layer, read = CachedAttention(policy), []
    sizes = [prompt] + [1] * (q.shape[2] - prompt)
    outputs = []
    for part in zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True):
        outputs.append(layer(*part))
        read.append(layer.bytes_read)
    return torch.cat(outputs, 2), layer, read[1:]


@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "stride", "prompt", "kernel"),
    [(4, 2, 6, 4, 12, 1), (2, 2, 3, 7, 9, 3), (3, 1, 40, 2, 10, 7), (4, 4, 5, 1, 6, 1), (2, 1, 16, 5, 1, 5)],
)
def test_fixed_stride_matches_the_oracle(
    heads: int, groups: int, tokens: int, stride: int, prompt: int, kernel: int
) -> None:
    q, k, v = inputs(heads, groups, 27)
    policy = Recycled(tokens, stride, None, kernel)
    out, layer, _ = steps(policy, q, k, v, prompt)
    expected, full = oracle(q, k, v, prompt, policy)
    assert full[0] == list(range(prompt + stride - 1, 27, stride))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert layer.kept.complete


@pytest.mark.parametrize(("tokens", "stride", "similarity"), [(5, 2, 0.5), (4, 1, 0.0), (6, 3, 0.2)])
def test_dynamic_stride_matches_the_oracle_and_sequences_decide_alone(
    tokens: int, stride: int, similarity: float
) -> None:
    q, k, v = inputs(4, 2, 30)
    q[1] = q[1, :, :1] + 0.7 * q[1]  # alike
    q[1, :, 22:24] *= -1
    policy = Recycled(tokens, stride, similarity, kernel=1)
    out, _, _ = steps(policy, q, k, v, 11)
    expected, full = oracle(q, k, v, 11, policy)
    assert len(full[0]) > len(full[1]) > 0
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_bytes_of_recycled_and_full_steps() -> None:
    q, k, v = inputs(4, 2, 20)
    _, _, read = steps(Recycled(tokens=6, stride=3, similarity=None), q, k, v, 14)
    lists, token, key = 2 * 2, (8 + 5) * 8, 8 * 8
    full = [lists * n * (token + key) for n in (17, 20)]
    assert read == [lists * 6 * token, lists * 6 * token, full[0], lists * 6 * token, lists * 6 * token, full[1]]


def test_left_padded_equals_alone() -> None:
    q, k, v = inputs(2, 1, 26)
    present = torch.ones(2, 15, dtype=torch.bool)
    present[1, :6] = False
    policy = Recycled(tokens=4, stride=4, similarity=0.1)
    padded, alone = CachedAttention(policy), CachedAttention(policy)
    padded(*(x[:, :, :15] for x in (q, k, v)), present=present)
    alone(*(x[1:, :, 6:15] for x in (q, k, v)))
    for i in range(15, 26):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        torch.testing.assert_close(padded(*token)[1:], alone(*(x[1:] for x in token)), rtol=0, atol=1e-12)


def test_beside_eviction() -> None:
    """A list of slots that moved is not used: with room for all that is kept, the same as eviction alone."""
    q, k, v = inputs(2, 2, 26)
    keep = SinkRecent(sinks=2, recent=9)
    out, layer, _ = steps(compose(keep=keep, read=Recycled(tokens=12, stride=4)), q, k, v, 5)
    expected, _, _ = steps(keep, q, k, v, 5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert len(layer.kept) == 10


def test_by_hand() -> None:
    """Query heads 0 and 1 look at tokens 1 and 3: both are listed; the new token takes the place of the weaker."""
    k = torch.zeros(1, 1, 5, 2, dtype=torch.float64)
    k[0, 0, 1, 0], k[0, 0, 3, 1] = 9.0, 7.0
    layer = CachedAttention(Recycled(tokens=2, stride=9, similarity=None, kernel=1))
    layer(torch.eye(2, dtype=torch.float64).view(1, 2, 1, 2).expand(1, 2, 5, 2), k, k)
    assert layer.kept.derived["recycled"].tensors["order"].tolist() == [[[1, 3]]]
    layer.kept.append(k[:, :, :1], k[:, :, :1])
    index = layer.policy.read(torch.ones(1, 2, 1, 2, dtype=torch.float64), layer.kept, layer.step)
    assert [j for j in index.indices.flatten().tolist() if j >= 0] == [1, 5]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="tokens=0: expected at least 1 token"):
        Recycled(tokens=0)
    with pytest.raises(ValueError, match="stride=0: expected at least 1 step"):
        Recycled(stride=0)
    with pytest.raises(ValueError, match=r"similarity=1.5: expected a cosine from -1 to 1, or None"):
        Recycled(similarity=1.5)
    with pytest.raises(ValueError, match="kernel=2: expected an odd number, at least 1"):
        Recycled(kernel=2)
