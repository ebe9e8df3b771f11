"""MInference against the paper's three patterns, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where.minference import MInference, search_heads
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def random_qkv(batch: int, heads: int, groups: int, tokens: int, dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, dim), (batch, groups, tokens, dim), (batch, groups, tokens, dim + 1))
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def lines(q: Tensor, k: Tensor, last: int) -> tuple[list[float], list[float]]:
    """Sums of the last queries' attention per key and per distance, for one head."""
    tokens = len(k)
    vertical, slash = [0.0] * tokens, [0.0] * tokens
    for i in range(max(tokens - last, 0), tokens):
        weights = [math.exp(float(q[i] @ k[j]) / math.sqrt(q.shape[1])) for j in range(i + 1)]
        for j, weight in enumerate(weights):
            vertical[j] += weight / sum(weights)
            slash[i - j] += weight / sum(weights)
    return vertical, slash


def largest(values: list[float], count: int, always: int) -> set[int]:
    forced = [math.inf if place < always else value for place, value in enumerate(values)]
    return set(sorted(range(len(values)), key=lambda place: -forced[place])[:count])


def vertical_slash(q: Tensor, k: Tensor, m: MInference) -> Tensor:
    """Bool `[N, N]` for one head."""
    tokens = len(k)
    vertical, slash = lines(q, k, m.last_queries)
    columns = largest(vertical, max(m.vertical, m.sinks), m.sinks)
    distances = largest(slash, max(m.slash, m.local), m.local)
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        row = range(i // m.block * m.block, (i // m.block + 1) * m.block)
        for j in range(i + 1):
            mask[i, j] = j in columns or any(other - j in distances for other in row)
    return mask


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 4, 2, 48), {"vertical": 6, "slash": 3, "last_queries": 8, "sinks": 2, "local": 2, "block": 8}),
        ((1, 3, 1, 37), {"vertical": 2, "slash": 1, "last_queries": 5, "sinks": 4, "local": 4, "block": 6}),
        ((1, 2, 2, 20), {"vertical": 0, "slash": 5, "last_queries": 64, "sinks": 0, "local": 0, "block": 7}),
        ((1, 2, 1, 9), {"vertical": 3, "slash": 2, "last_queries": 4, "sinks": 1, "local": 1, "block": 16}),
        ((1, 2, 1, 40), {"vertical": 400, "slash": 2, "last_queries": 4, "sinks": 1, "local": 1, "block": 8}),
    ],
)
def test_vertical_slash(shape: tuple[int, ...], settings: dict[str, int]) -> None:
    q, k, v = random_qkv(*shape)
    mechanism = MInference(form="vertical_slash", **settings)
    share = shape[1] // shape[2]
    mask = torch.stack([torch.stack([vertical_slash(q[b, h], k[b, h // share], mechanism) for h in range(shape[1])])
                        for b in range(shape[0])])  # fmt: skip
    chosen = mechanism.pattern(q, k, CAUSAL)
    chosen.validate()
    assert torch.equal(chosen.to_dense(), mask)
    torch.testing.assert_close(mechanism(q, k, v, geometry=CAUSAL), attention(q, k, v, mask), atol=1e-10, rtol=0)


def test_known_by_hand() -> None:
    """The last two queries like key 1 (a column) and, as every query, the key three before them (a diagonal)."""
    tokens = 8
    q = torch.cat([torch.eye(tokens).roll(3, 0)[:, :tokens], torch.ones(tokens, 1)], 1)
    k = torch.cat([torch.eye(tokens), torch.zeros(tokens, 1)], 1)
    k[1, tokens] = 1.0
    m = MInference(vertical=1, slash=1, last_queries=2, sinks=0, local=0, block=1)
    dense = m.pattern(20 * q.view(1, 1, tokens, -1), k.view(1, 1, tokens, -1), CAUSAL).to_dense()[0, 0].int()
    expected = ["00000000", "01000000", "01000000", "11000000", "01000000", "01100000", "01010000", "01001000"]
    assert ["".join(str(int(x)) for x in row) for row in dense] == expected


@pytest.mark.parametrize("tokens", [33, 48])
def test_a_shape(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    mask = (j <= i) & ((i - j < 5) | (j < 3))
    layout = MInference(form="a_shape", vertical=3, slash=5, block=8).pattern(q, k, CAUSAL)
    assert torch.equal(layout.to_dense()[0, 0], mask)


@pytest.mark.parametrize("tokens", [33, 48])
def test_block(tokens: int) -> None:
    q, k, _ = random_qkv(1, 4, 2, tokens)
    size, topk = 6, 3
    layout = MInference(form="block", topk=topk, block=size).pattern(q, k, CAUSAL)
    for h in range(4):
        queries, keys = q[0, h].split(size), k[0, h // 2].split(size)
        mask = torch.zeros(tokens, tokens, dtype=torch.bool)
        for r, block in enumerate(queries):
            scores = [float(block.mean(0) @ keys[c].mean(0)) for c in range(r + 1)]
            for c in sorted(range(r + 1), key=lambda c: -scores[c])[:topk]:
                mask[r * size : (r + 1) * size, c * size : (c + 1) * size] = True
        assert torch.equal(layout.to_dense()[0, h], mask.tril())


def test_head_search_finds_each_heads_form() -> None:
    """Head 0 looks back 10 tokens, head 1 at three keys: one line of either kind serves one of them only."""
    tokens, dim = 64, 64
    places = torch.eye(tokens, dim, dtype=torch.float64)
    q = torch.stack([places.roll(10, 0), places[5] + places[17] + places[29] + 0 * places]) * 60
    k = places.expand(2, -1, -1)
    v = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = {"form": "vertical_slash", "last_queries": 8, "sinks": 0, "local": 0, "block": 1}
    candidates = (shared | {"vertical": 0, "slash": 1}, shared | {"vertical": 3, "slash": 1})
    best = search_heads(q[None], k[None], v[None], candidates)
    assert best[1] == candidates[1]
    only_slash = shared | {"vertical": 0, "slash": 3}
    assert search_heads(q[None], k[None], v[None], (only_slash, candidates[1]))[1] == candidates[1]
    with pytest.raises(ValueError, match=r"candidates=\(\): expected at least one dict of settings"):
        search_heads(q[None], k[None], v[None], ())


def test_later_queries_choose_for_earlier_ones() -> None:
    """What the card says of prefill: this is why law 4 is not asked of it."""
    q, k, _ = random_qkv(1, 1, 1, 64)
    changed = q.clone()
    changed[:, :, -8:] = changed[:, :, -8:].flip(-1)
    m = MInference(vertical=6, slash=2, last_queries=8, sinks=0, local=1, block=8)
    before, after = (m.pattern(x, k, CAUSAL).to_dense()[:, :, :32] for x in (q, changed))
    assert not torch.equal(before, after)
    assert "outputs of earlier tokens depend on later ones" in m.card.prefill_only


def test_only_whole_prompts() -> None:
    q, k, v = random_qkv(1, 2, 1, 32)
    message = "1 queries and 32 keys: expected as many, minference is for prefill only: vertical and slash lines"
    with pytest.raises(ValueError, match=message):
        MInference()(q[:, :, -1:], k, v, geometry=CAUSAL)


@pytest.mark.parametrize("form", ["a_shape", "vertical_slash", "block"])
def test_no_tokens(form: str) -> None:
    q, k, v = random_qkv(1, 2, 1, 0)
    assert MInference(form=form)(q, k, v, geometry=CAUSAL).shape == (1, 2, 0, 9)


@pytest.mark.parametrize("tokens", [64, 256])
def test_ladder_rises(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens)
    kept = [MInference(**s).pattern(q, k, CAUSAL).density() for s in MInference.card.ladder(tokens)]
    assert all(low < high for low, high in zip(kept, kept[1:], strict=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "dense"}, "form='dense': expected one of"),
        ({"vertical": -1}, "vertical=-1: expected at least 0 tokens"),
        ({"slash": 0}, "slash=0: expected at least 1 token"),
        ({"topk": 0}, "topk=0: expected at least 1 block"),
        ({"last_queries": 0}, "last_queries=0: expected at least 1 query"),
        ({"sinks": -1}, "sinks=-1: expected at least 0 tokens"),
        ({"local": -1}, "local=-1: expected at least 0 tokens"),
        ({"block": 0}, "block=0: expected at least 1 token"),
    ],
)
def test_bad_setting(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MInference(**settings)
