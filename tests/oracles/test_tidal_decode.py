"""TidalDecode against a loop over layers and heads that carries a list of chosen positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.tidal_decode import TidalDecode


def oracle(q: list[Tensor], k: list[Tensor], v: list[Tensor], prompt: int, tokens: int, first: int, again: int | None):
    """Layer l of the token at place i >= prompt; q[l] etc. are all tokens of the layer."""
    outs = [torch.zeros(*layer.shape[:3], v[0].shape[3], dtype=layer.dtype) for layer in q]
    batch, heads, total, dim = q[0].shape
    share = heads // k[0].shape[1]
    for b in range(batch):
        for h in range(heads):
            for i in range(total):
                chosen: list[int] = []
                for layer in range(len(q)):
                    scores = k[layer][b, h // share, : i + 1] @ q[layer][b, h, i] / math.sqrt(dim)
                    if layer in (first, again):
                        chosen = sorted(range(i + 1), key=lambda j: -float(scores[j]))[:tokens]
                    sparse = i >= prompt and layer > first and layer != again
                    seen = chosen if sparse else list(range(i + 1))
                    outs[layer][b, h, i] = scores[seen].softmax(0) @ v[layer][b, h // share, seen]
    return outs


def shared_oracle(q: list[Tensor], k: list[Tensor], v: list[Tensor], prompt: int, tokens: int, first: int, again: int):
    """One list for all heads: the slots with the most softmax weight, summed over heads."""
    outs = [torch.zeros(*layer.shape[:3], v[0].shape[3], dtype=layer.dtype) for layer in q]
    batch, heads, total, dim = q[0].shape
    share = heads // k[0].shape[1]
    for b in range(batch):
        for i in range(total):
            chosen: list[int] = []
            for layer in range(len(q)):
                scores = [k[layer][b, h // share, : i + 1] @ q[layer][b, h, i] / math.sqrt(dim) for h in range(heads)]
                if layer in (first, again):
                    votes = [sum(float(row.exp()[j] / row.exp().sum()) for row in scores) for j in range(i + 1)]
                    chosen = sorted(range(i + 1), key=lambda j, v=votes: -v[j])[:tokens]  # type: ignore[misc]
                sparse = i >= prompt and layer > first and layer != again
                seen = chosen if sparse else list(range(i + 1))
                for h in range(heads):
                    outs[layer][b, h, i] = scores[h][seen].softmax(0) @ v[layer][b, h // share, seen]
    return outs


def inputs(layers: int, heads: int, groups: int, tokens: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(layers)

    def draw(width: int, dim: int) -> list[Tensor]:
        shape = (2, width, tokens, dim)
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(layers)]

    return draw(heads, 8), draw(groups, 8), draw(groups, 6)


def run(policy: TidalDecode, q: list[Tensor], k: list[Tensor], v: list[Tensor], prompt: int):
    """Prompt whole, then token by token, all layers in order."""
    stack = CachedAttention.stack(policy, len(q))
    total = q[0].shape[2]
    sizes = [prompt] + [1] * (total - prompt)
    outs: list[list[Tensor]] = [[] for _ in q]
    start = 0
    for size in sizes:
        for layer, attention in enumerate(stack):
            part = slice(start, start + size)
            outs[layer].append(attention(q[layer][:, :, part], k[layer][:, :, part], v[layer][:, :, part]))
        start += size
    return [torch.cat(parts, 2) for parts in outs], stack


@pytest.mark.parametrize(
    ("layers", "heads", "groups", "tokens", "first", "again"),
    [(5, 2, 2, 3, 1, 3), (4, 4, 2, 4, 0, None), (6, 3, 1, 1, 2, 4), (3, 2, 1, 100, 0, 1)],
)
def test_matches_the_oracle(layers: int, heads: int, groups: int, tokens: int, first: int, again: int | None) -> None:
    q, k, v = inputs(layers, heads, groups, 12)
    expected = oracle(q, k, v, 7, tokens, first, again)
    outs, stack = run(TidalDecode(tokens=tokens, first_selection=first, reselection=again), q, k, v, 7)
    for out, reference in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=0, atol=1e-10)
    pair = (8 + 6) * 8
    for attention in stack:
        sparse = attention.layer > first and attention.layer != again
        full = 2 * groups * 12 * pair
        assert attention.bytes_read == (2 * heads * min(tokens, 12) * pair if sparse else full)
        assert attention.kept.complete


def test_a_list_for_all_heads_matches_the_oracle() -> None:
    q, k, v = inputs(5, 4, 2, 12)
    outs, stack = run(TidalDecode(tokens=4, first_selection=1, reselection=3, shared=True), q, k, v, 7)
    for out, reference in zip(outs, shared_oracle(q, k, v, 7, 4, 1, 3), strict=True):
        torch.testing.assert_close(out, reference, rtol=0, atol=1e-10)
    assert stack[2].bytes_read == 2 * 2 * 4 * (8 + 6) * 8  # heads that share keys read them once


def test_a_list_for_all_heads_needs_the_same_tokens_in_all() -> None:
    q, k, v = inputs(1, 2, 2, 6)
    store = KVStore()
    store.append(k[0][:1], v[0][:1])
    keep = torch.ones(1, 2, 6, dtype=torch.bool)
    keep[0, 0, 1] = keep[0, 1, 2] = False
    store.evict(keep)
    with pytest.raises(
        ValueError, match="keep='other tokens in each head': expected a policy that keeps the same in all"
    ):
        TidalDecode(tokens=2, shared=True).select(q[0][:1, :, :1], store)


def test_full_budget_is_dense() -> None:
    q, k, v = inputs(4, 4, 2, 10)
    outs, _ = run(TidalDecode(tokens=10, first_selection=1, reselection=None), q, k, v, 4)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    for layer, out in enumerate(outs):
        scores = q[layer] @ k[layer].repeat_interleave(2, 1).mT / math.sqrt(8)
        expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[layer].repeat_interleave(2, 1)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_by_hand() -> None:
    """Layer 0 finds token 2; layer 1, whose own scores favour token 0, must read token 2 nevertheless."""
    stack = CachedAttention.stack(TidalDecode(tokens=1, first_selection=0, reselection=None), 2)
    values = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64).view(1, 1, 4, 1)
    for layer, favourite in enumerate((2, 0)):
        k = torch.zeros(1, 1, 4, 2, dtype=torch.float64)
        k[0, 0, favourite, 0] = 9.0
        stack[layer](k[:, :, :3] * 0, k[:, :, :3], values[:, :, :3])
    last = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    stack[0](last, torch.zeros_like(last), values[:, :, 3:])
    assert float(stack[1](last, torch.zeros_like(last), values[:, :, 3:])) == 30.0


def test_a_choice_of_another_token_or_none_is_refused() -> None:
    policy = TidalDecode(tokens=2, first_selection=0, reselection=None)
    q, k, v = inputs(1, 2, 2, 4)
    store = KVStore()
    store.append(k[0], v[0])
    with pytest.raises(ValueError, match="layer=1: no choice for 4 slots, expected the selection layer 0"):
        policy.read(q[0][:, :, :1], store, Step(layer=1))
    step = Step(layer=0)
    policy.read(q[0][:, :, :1], store, step)
    assert step.picked is not None
    store.append(k[0][:, :, :1], v[0][:, :, :1])
    step.layer = 1
    with pytest.raises(ValueError, match="layer=1: no choice for 5 slots"):
        policy.read(q[0][:, :, :1], store, step)
    with pytest.raises(ValueError, match="expected at least one token"):
        policy.select(q[0][:, :, :1], KVStore())


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="tokens=0: expected at least 1 token"):
        TidalDecode(tokens=0)
    with pytest.raises(ValueError, match="first_selection=-1: expected a layer, at least 0"):
        TidalDecode(first_selection=-1)
    with pytest.raises(ValueError, match="reselection=2: expected None or a layer after first_selection=2"):
        TidalDecode(reselection=2)
