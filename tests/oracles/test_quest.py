"""Quest against loops over pages and channels, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import Step, compose
from saccade.mechanisms.cache.quest import Quest
from saccade.mechanisms.cache.sink_recent import SinkRecent


def chosen_by(q: Tensor, keys: Tensor, page: int, tokens: int) -> list[int]:
    """Tokens that one query reads of keys `[n, D]`."""
    pages = [list(range(start, min(start + page, len(keys)))) for start in range(0, len(keys), page)]
    bounds = []
    for members in pages[:-1]:
        total = 0.0
        for c in range(len(q)):
            low, high = min(float(keys[j, c]) for j in members), max(float(keys[j, c]) for j in members)
            total += max(float(q[c]) * low, float(q[c]) * high)
        bounds.append(total)
    best = sorted(range(len(bounds)), key=lambda i: -bounds[i])[: max(3, tokens // page) - 1]
    return sorted(j for i in [*best, len(pages) - 1] for j in pages[i])


def oracle(q: Tensor, k: Tensor, v: Tensor, prompt: int, page: int, tokens: int) -> Tensor:
    batch, heads, total, dim = q.shape
    share = heads // k.shape[1]
    out = torch.zeros(batch, heads, total, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(total):
                keys = k[b, h // share, : i + 1]
                seen = list(range(i + 1)) if i < prompt else chosen_by(q[b, h, i], keys, page, tokens)
                weights = (keys[seen] @ q[b, h, i] / math.sqrt(dim)).softmax(0)
                out[b, h, i] = weights @ v[b, h // share, seen]
    return out


def inputs(heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 5))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def steps(policy, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> tuple[Tensor, CachedAttention]:
    layer = CachedAttention(policy)
    sizes = [prompt] + [1] * (q.shape[2] - prompt)
    parts = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    return torch.cat([layer(*part) for part in parts], 2), layer


@pytest.mark.parametrize(
    ("heads", "groups", "page", "tokens", "prompt"), [(4, 2, 2, 8, 11), (2, 2, 3, 3, 20), (3, 1, 4, 16, 1)]
)
def test_matches_the_oracle(heads: int, groups: int, page: int, tokens: int, prompt: int) -> None:
    q, k, v = inputs(heads, groups, 30)
    out, layer = steps(Quest(tokens=tokens, page=page, dense_layers=0), q, k, v, prompt)
    torch.testing.assert_close(out, oracle(q, k, v, prompt, page, tokens), rtol=0, atol=1e-10)
    last = page if 30 % page == 0 else 30 % page
    pages, count = -(-30 // page), max(3, tokens // page)
    attention = 2 * heads * ((count - 1) * page + last) * (8 + 5) * 8
    assert layer.bytes_read == attention + 2 * groups * (pages * 2 * 8 + 8) * 8  # and the bounds, and the new key
    assert layer.kept.complete


def test_left_padded_equals_alone_and_dense_layers_are_dense() -> None:
    q, k, v = inputs(2, 1, 22)
    present = torch.ones(2, 15, dtype=torch.bool)
    present[1, :6] = False
    policy = Quest(tokens=6, page=2, dense_layers=0)
    padded, alone = CachedAttention(policy), CachedAttention(policy)
    padded(*(x[:, :, :15] for x in (q, k, v)), present=present)
    alone(*(x[1:, :, 6:15] for x in (q, k, v)))
    for i in range(15, 22):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        torch.testing.assert_close(padded(*token)[1:], alone(*(x[1:] for x in token)), rtol=0, atol=1e-12)
    assert Quest(tokens=6, page=2, dense_layers=1).read(q[:, :, -1:], padded.kept, Step(layer=0)) is None


def test_bounds_follow_evictions() -> None:
    """Composed with a policy that moves slots each step: what is read is what is there."""
    q, k, v = inputs(2, 2, 26)
    out, layer = steps(compose(keep=SinkRecent(sinks=2, recent=9), read=Quest(page=2, dense_layers=0)), q, k, v, 5)
    expected, _ = steps(SinkRecent(sinks=2, recent=9), q, k, v, 5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert len(layer.kept) == 10


def test_by_hand() -> None:
    """Pages {5, -5}, {3, 3}, {4, -9}, {0}: for q = 1 the bounds are 5, 3, 4, for q = -1 5, -3, 9; the last is read."""
    k = torch.tensor([5.0, -5, 3, 3, 4, -9], dtype=torch.float64).view(1, 1, 6, 1)
    policy = Quest(tokens=2, page=2, dense_layers=0)  # three pages at least
    for sign in (1.0, -1.0):
        layer = CachedAttention(policy)
        layer(k, k, k)
        layer.kept.append(k[:, :, :1] * 0, k[:, :, :1] * 0)
        index = policy.select(torch.full((1, 1, 1, 1), sign, dtype=torch.float64), layer.kept, Step())
        assert sorted(j for j in index.indices.flatten().tolist() if j >= 0) == [0, 1, 4, 5, 6]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="page=0: expected at least 1 token"):
        Quest(page=0)
    with pytest.raises(ValueError, match="tokens=3: expected at least page=4"):
        Quest(tokens=3, page=4)
    with pytest.raises(ValueError, match="dense_layers=-1: expected at least 0 layers"):
        Quest(dense_layers=-1)
