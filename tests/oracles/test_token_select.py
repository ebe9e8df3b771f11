"""TokenSelect against loops over heads and a remembered choice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import Step, compose
from saccade.mechanisms.cache.h2o import H2O
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.token_select import TokenSelect


def votes(q: Tensor, k: Tensor, first: int, stop: int, kernel: int) -> list[float]:
    """Of tokens first .. stop - 1 for one token's queries `[H, D]`, keys `[G, n, D]`."""
    share = len(q) // len(k)
    total = torch.zeros(stop - first, dtype=q.dtype)
    for h in range(len(q)):
        total += (k[h // share, first:stop] @ q[h]).softmax(0)
    reach = kernel // 2
    return [float(total[max(0, j - reach) : j + reach + 1].max()) for j in range(stop - first)]


def oracle(q: Tensor, k: Tensor, v: Tensor, prompt: int, policy: TokenSelect) -> tuple[Tensor, int]:
    """Outputs, and how often a choice was used again."""
    batch, heads, total, dim = q.shape
    share, again = heads // k.shape[1], 0
    out = torch.zeros(batch, heads, total, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        asked, chosen = None, []
        for i in range(total):
            seen = list(range(i + 1))
            if i >= prompt and i + 1 > policy.sinks + policy.tokens + policy.local:
                query, first, stop = q[b, :, i].flatten(), policy.sinks, i + 1 - policy.local
                if asked is not None and float(query @ asked / query.norm() / asked.norm()) >= policy.similarity:
                    again += 1
                else:
                    ranks = votes(q[b, :, i], k[b, :, : i + 1], first, stop, policy.kernel)
                    order = sorted(range(len(ranks)), key=lambda j: -ranks[j])  # noqa: B023  used at once
                    asked, chosen = query, [first + j for j in order[: policy.tokens]]
                seen = sorted({*range(first), *chosen, *range(stop, i + 1)})
            for h in range(heads):
                weights = (k[b, h // share, seen] @ q[b, h, i] / math.sqrt(dim)).softmax(0)
                out[b, h, i] = weights @ v[b, h // share, seen]
    return out, again


def inputs(heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries come in pairs that are alike."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 5))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    q[1, :, 1::2] = q[1, :, ::2] + 0.1 * q[1, :, 1::2]
    return q, k, v


@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "sinks", "local", "kernel"),
    [(4, 2, 5, 2, 3, 1), (2, 2, 1, 0, 1, 3), (3, 1, 9, 4, 6, 1)],
)
def test_matches_the_oracle(heads: int, groups: int, tokens: int, sinks: int, local: int, kernel: int) -> None:
    q, k, v = inputs(heads, groups, 28)
    policy = TokenSelect(tokens=tokens, sinks=sinks, local=local, kernel=kernel)
    expected, again = oracle(q, k, v, 14, policy)
    assert again > 0
    layer = CachedAttention(policy)
    sizes = [14] + [1] * 14
    parts = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    out = torch.cat([layer(*part) for part in parts], 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_a_choice_used_again_costs_its_tokens_only() -> None:
    q, k, v = inputs(2, 1, 20)
    layer = CachedAttention(TokenSelect(tokens=3, sinks=1, local=2, similarity=-1.0))
    read = []
    layer(*(x[:, :, :18] for x in (q, k, v)))
    for i in (18, 19):
        layer(*(x[:, :, i : i + 1] for x in (q, k, v)))
        read.append(layer.bytes_read)
    assert read == [2 * (6 * (8 + 5) + 16 * 8) * 8, 2 * 6 * (8 + 5) * 8]


def test_by_hand() -> None:
    """Head 0 looks at token 1, both others at token 2: two votes against one."""
    k = torch.zeros(1, 1, 5, 2, dtype=torch.float64)
    k[0, 0, 1, 0], k[0, 0, 2, 1] = 50.0, 50.0
    q = torch.tensor([[1.0, 0], [0, 1], [0, 1]], dtype=torch.float64).view(1, 3, 1, 2)
    store = KVStore()
    store.append(k, k)
    index = TokenSelect(tokens=1, sinks=1, local=1).select(q, store, Step())
    assert index is not None
    assert index.indices.flatten().tolist() == [0, 2, 4]


def test_heads_with_other_tokens_are_refused() -> None:
    q, k, v = inputs(2, 2, 20)
    layer = CachedAttention(TokenSelect(tokens=2, sinks=1, local=1))
    layer.kept.append(k, v)
    keep = torch.ones(2, 2, 20, dtype=torch.bool)
    keep[:, 1, 3] = False
    layer.kept.evict(keep)
    with pytest.raises(ValueError, match="keep='other tokens in each head': expected a policy that keeps the same"):
        layer(*(x[:, :, :1] for x in (q, k, v)))
    with pytest.raises(ValueError, match="needs the attention of all that is kept"):
        compose(keep=H2O(), read=TokenSelect())


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="tokens=0: expected at least 1 token"):
        TokenSelect(tokens=0)
    with pytest.raises(ValueError, match="sinks=-1: expected at least 0 tokens"):
        TokenSelect(sinks=-1)
    with pytest.raises(ValueError, match="local=0: expected at least 1 token"):
        TokenSelect(local=0)
    with pytest.raises(ValueError, match="kernel=2: expected an odd number"):
        TokenSelect(kernel=2)
    with pytest.raises(ValueError, match="dense_layers=-1: expected at least 0 layers"):
        TokenSelect(dense_layers=-1)
