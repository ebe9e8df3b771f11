"""FlexPrefill against the paper's algorithms 1 to 4, head by head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where.flex_prefill import FlexPrefill
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def random_qkv(batch: int, heads: int, groups: int, tokens: int, dim: int = 8, size: float = 2.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, dim), (batch, groups, tokens, dim), (batch, groups, tokens, dim + 1))
    return tuple(size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def softmax(scores: list[float]) -> list[float]:
    weights = [math.exp(x) for x in scores]
    return [w / sum(weights) for w in weights]


def jensen_shannon(p: list[float], q: list[float]) -> float:
    def divergence(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return math.sqrt(max(divergence(p, middle) / 2 + divergence(q, middle) / 2, 0.0))


def cover(values: list[float], gamma: float) -> int:
    """How many of the largest values stay within gamma, and one more."""
    total, count = 0.0, 0
    for value in sorted(values, reverse=True):
        total += value
        if total > gamma:
            break
        count += 1
    return count + 1


def oracle(q: Tensor, k: Tensor, m: FlexPrefill) -> tuple[list[list[bool]], bool]:
    """Kept blocks of one head, and whether it is query-aware."""
    tokens, root = len(k), math.sqrt(q.shape[1])
    size = m.block
    blocks = math.ceil(tokens / size)
    last = range(tokens - size, tokens)
    vertical, slash = [0.0] * tokens, [0.0] * tokens
    for i in last:
        for j, weight in enumerate(softmax([float(q[i] @ k[j]) / root for j in range(i + 1)])):
            vertical[j] += weight / size
            slash[i - j] += weight / size
    columns = [sum(vertical[b * size : (b + 1) * size]) for b in range(blocks)]
    diagonals = [sum(slash[b * size : (b + 1) * size]) for b in range(blocks)]
    key_means = [x.mean(0) for x in k.split(size)]
    estimate = softmax([float(q[last.start :].mean(0) @ key) / root for key in key_means])
    aware = jensen_shannon(estimate, columns) < m.tau

    def lines(sums: list[float], weights: list[float]) -> set[int]:
        least = math.ceil(m.min_budget / size)
        count = least if aware else max(cover(sums, m.gamma) // size + 1, least)
        count = min(count, blocks if m.max_budget is None else math.ceil(m.max_budget / size))
        forced = [math.inf, *weights[1:]]
        return set(sorted(range(blocks), key=lambda b: -forced[b])[:count])

    column, diagonal = lines(vertical, columns), lines(slash, diagonals)
    kept = [[c <= r and (c in column or r - c in diagonal) for c in range(blocks)] for r in range(blocks)]
    if aware:
        entries = []
        for r, rows in enumerate(q.split(size)):
            weights = softmax([float(rows.mean(0) @ key_means[c]) / root for c in range(r + 1)])
            entries += [(weight, r, c) for c, weight in enumerate(weights)]
        total = 0.0
        for weight, r, c in sorted(entries, reverse=True):
            total += weight
            if total > m.gamma * blocks:
                break
            kept[r][c] = True
    return kept, aware


SETTINGS = [
    {"gamma": 0.5, "tau": 0.0, "block": 4, "min_budget": 4},
    {"gamma": 0.8, "tau": 1.0, "block": 4, "min_budget": 4},
    {"gamma": 0.7, "tau": 0.3, "block": 5, "min_budget": 9},
    {"gamma": 0.9, "tau": 0.0, "block": 4, "min_budget": 4, "max_budget": 12},
]


@pytest.mark.parametrize("shape", [(2, 4, 2, 48), (1, 3, 1, 37)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_paper_form(shape: tuple[int, ...], settings: dict[str, float]) -> None:
    q, k, v = random_qkv(*shape)
    m = FlexPrefill(**settings)
    tokens, share = shape[3], shape[1] // shape[2]
    masks = [[oracle(q[b, h], k[b, h // share], m)[0] for h in range(shape[1])] for b in range(shape[0])]
    mask = torch.tensor(masks).repeat_interleave(m.block, 2).repeat_interleave(m.block, 3)[..., :tokens, :tokens].tril()
    layout = m.pattern(q, k, CAUSAL)
    layout.validate()
    assert torch.equal(layout.to_dense(), mask)
    torch.testing.assert_close(m(q, k, v, geometry=CAUSAL), attention(q, k, v, mask), atol=1e-10, rtol=0)


def test_heads_of_both_kinds_are_among_the_cases() -> None:
    q, k, _ = random_qkv(2, 4, 2, 48)
    kinds = {oracle(q[b, h], k[b, h // 2], FlexPrefill(**SETTINGS[2]))[1] for b in range(2) for h in range(4)}
    assert kinds == {True, False}


def test_known_by_hand() -> None:
    """All attention of the last queries goes to key 5 and to themselves: columns 0 and 1, diagonals 0 and 1."""
    k = torch.zeros(1, 1, 16, 2)
    k[0, 0, 5, 0] = 30.0
    q = torch.ones(1, 1, 16, 2)
    mask = FlexPrefill(gamma=0.9, tau=0.0, block=4, min_budget=8).pattern(q, k, CAUSAL).block_mask()[0, 0].int()
    assert mask.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("tokens", [8, 16])
def test_short_prompts_are_dense(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens)
    assert FlexPrefill(gamma=0.1, block=8, min_budget=1).pattern(q, k, CAUSAL).density(causal=True) == 1.0


def test_later_queries_choose_for_earlier_ones() -> None:
    """What the card says of prefill: this is why law 4 is not asked of it."""
    q, k, _ = random_qkv(1, 1, 1, 64)
    changed = q.clone()
    changed[:, :, -4:] *= -3
    m = FlexPrefill(gamma=0.5, tau=0.0, block=4, min_budget=4)
    before, after = (m.pattern(x, k, CAUSAL).to_dense()[:, :, :32] for x in (q, changed))
    assert not torch.equal(before, after)
    assert "outputs of earlier tokens depend on later ones" in m.card.prefill_only


def test_only_whole_prompts() -> None:
    q, k, v = random_qkv(1, 2, 1, 32)
    message = "8 queries and 32 keys: expected as many, flex_prefill is for prefill only: the last block of queries"
    with pytest.raises(ValueError, match=message):
        FlexPrefill()(q[:, :, -8:], k, v, geometry=CAUSAL)


def test_no_tokens() -> None:
    q, k, v = random_qkv(1, 2, 1, 0)
    assert FlexPrefill()(q, k, v, geometry=CAUSAL).shape == (1, 2, 0, 9)


@pytest.mark.parametrize("tokens", [128, 256])
def test_ladder_rises(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens)
    kept = [FlexPrefill(**s).pattern(q, k, CAUSAL).density(causal=True) for s in FlexPrefill.card.ladder(tokens)]
    assert all(low <= high for low, high in zip(kept, kept[1:], strict=False))
    assert kept[0] < kept[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.0}, r"gamma=0.0: expected a fraction in \(0, 1\]"),
        ({"tau": 1.5}, r"tau=1.5: expected a distance in \[0, 1\]"),
        ({"block": 0}, "block=0: expected at least 1 token"),
        ({"min_budget": 0}, "min_budget=0: expected at least 1 token"),
        ({"max_budget": 5}, "max_budget=5: expected None or at least min_budget=1024"),
    ],
)
def test_bad_setting(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlexPrefill(**settings)
