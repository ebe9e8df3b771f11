"""SALE against the paper's relative attention score, pair by pair, in integers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where.sale import SALE
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def random_qkv(batch: int, heads: int, groups: int, queries: int, keys: int, dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = ((batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim + 1))
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def four_bit(token: Tensor) -> tuple[list[int], float]:
    """Integers from -7 to 7, and their unit."""
    unit = float(token.abs().max()) / 7
    return [round(float(x) / unit) if unit else 0 for x in token], unit


def estimate(query: Tensor, key: Tensor) -> float:
    (a, unit_a), (b, unit_b) = four_bit(query), four_bit(key)
    return sum(x * y for x, y in zip(a, b, strict=True)) * unit_a * unit_b / math.sqrt(len(query))


def oracle_blocks(q: Tensor, k: Tensor, m: SALE) -> list[list[bool]]:
    """Kept blocks of one head."""
    offset, columns = len(k) - len(q), math.ceil(len(k) / m.block_k)
    k = k - k[: m.block_k].mean(0)
    result = []
    for row in range(0, len(q), m.block_q):
        rows = range(row, min(row + m.block_q, len(q)))
        first, last = row + offset, rows[-1] + offset
        kept = []
        for c in range(columns):
            start, stop = c * m.block_k, min((c + 1) * m.block_k, len(k))
            inside = start <= last
            kept.append(inside and (c == 0 or start + m.block_k > first - m.local))
        for c in range(columns):
            if kept[c] or c * m.block_k > last:
                continue
            for i in rows:
                near = [j for j in range(i + offset + 1) if kept_at(j, first, m)]
                mass = sum(math.exp(float(q[i] @ k[j]) / math.sqrt(q.shape[1])) for j in near)
                stop = min((c + 1) * m.block_k, len(k))
                if any(math.exp(estimate(q[i], k[j])) / mass > m.threshold for j in range(c * m.block_k, stop)):
                    kept[c] = True
                    break
        result.append(kept)
    return result


def kept_at(key: int, first: int, m: SALE) -> bool:
    """Whether the key is in the sink or a neighbouring block."""
    block = key // m.block_k
    return block == 0 or (block + 1) * m.block_k > first - m.local


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 4, 2, 48, 48), {"threshold": 0.3, "block_q": 8, "block_k": 4, "local": 4}),
        ((1, 3, 1, 37, 37), {"threshold": 1.0, "block_q": 6, "block_k": 5, "local": 0}),
        ((1, 2, 2, 13, 42), {"threshold": 0.1, "block_q": 4, "block_k": 4, "local": 8}),
        ((1, 2, 1, 30, 30), {"threshold": 0.5, "block_q": 4, "block_k": 12, "local": 3}),
        ((1, 2, 1, 30, 30), {"threshold": 0.0, "block_q": 4, "block_k": 4, "local": 4}),
    ],
)
def test_paper_form(shape: tuple[int, ...], settings: dict[str, float]) -> None:
    q, k, v = random_qkv(*shape)
    m, share = SALE(**settings), shape[1] // shape[2]
    blocks = torch.tensor([[oracle_blocks(q[b, h], k[b, h // share], m) for h in range(shape[1])]
                           for b in range(shape[0])])  # fmt: skip
    mask = blocks.repeat_interleave(m.block_q, 2).repeat_interleave(m.block_k, 3)[..., : shape[3], : shape[4]]
    mask = mask.tril(shape[4] - shape[3])
    layout = m.pattern(q, k, CAUSAL)
    layout.validate()
    assert torch.equal(layout.to_dense(), mask)
    torch.testing.assert_close(m(q, k, v, geometry=CAUSAL), attention(q, k, v, mask), atol=1e-10, rtol=0)


def test_known_by_hand() -> None:
    """Key 2 scores 2 where the sink (0, 1) and the neighbours (6, 7) have e^0: e^2 / 4 = 1.8 is above 1.5, not 2."""
    k = torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]).view(1, 1, 8, 1)
    q = torch.ones(1, 1, 8, 1)
    for threshold, expected in ((1.5, [1, 1, 0, 1]), (2.0, [1, 0, 0, 1])):
        m = SALE(threshold=threshold, block_q=2, block_k=2, local=0)
        # Query 7 counts keys 0, 1, 6 and 7; query 6 only three of them, with e^2 / 3 = 2.46.
        mask = m.pattern(q[:, :, 7:], k, CAUSAL).block_mask()[0, 0, -1].int()
        assert mask.tolist() == expected


def test_four_bits_are_close_and_centring_helps() -> None:
    """A mean that all keys share costs the levels that tell them apart."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 256, 16, generator=generator) + 20 * torch.eye(16)[0]
    q = torch.randn(1, 1, 256, 16, generator=generator)
    dense = attention(q, k, k, torch.ones(256, 256, dtype=torch.bool).tril())
    m = SALE(threshold=0.4, block_q=16, block_k=8, local=16)
    layout = m.pattern(q, k, CAUSAL)
    assert layout.density(causal=True) < 0.95
    shifted = m.pattern(q, k - 20 * torch.eye(16)[0], CAUSAL)
    assert float((layout.to_dense() != shifted.to_dense()).float().mean()) < 1e-3
    assert float((m(q, k, k, geometry=CAUSAL) - dense).norm() / dense.norm()) < 0.05


def test_work_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = random_qkv(1, 4, 2, 61, 61)
    m = SALE(threshold=0.5, block_q=8, block_k=4, local=4)
    whole = m.pattern(q, k, CAUSAL).to_dense()
    monkeypatch.setattr("saccade.mechanisms.where.sale.CHUNK_SCORES", 1)
    assert torch.equal(m.pattern(q, k, CAUSAL).to_dense(), whole)


def test_choice_ignores_later_blocks() -> None:
    q, k, _ = random_qkv(1, 2, 2, 64, 64)
    changed_q, changed_k = q.clone(), k.clone()
    changed_q[:, :, 32:] += 3.0
    changed_k[:, :, 32:] = float("nan")
    m = SALE(threshold=0.5, block_q=8, block_k=4, local=4)
    before = m.pattern(q, k, CAUSAL).to_dense()[:, :, :32]
    assert torch.equal(before, m.pattern(changed_q, changed_k, CAUSAL).to_dense()[:, :, :32])


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 8)])
def test_no_tokens(queries: int, keys: int) -> None:
    q, k, v = random_qkv(1, 2, 1, queries, keys)
    assert SALE()(q, k, v, geometry=CAUSAL).shape == (1, 2, queries, 9)


@pytest.mark.parametrize("tokens", [64, 256])
def test_ladder_rises(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens, tokens)
    kept = [SALE(**s).pattern(q, k, CAUSAL).density(causal=True) for s in SALE.card.ladder(tokens)]
    assert all(low <= high for low, high in zip(kept, kept[1:], strict=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "threshold=-0.1: expected at least 0"),
        ({"block_q": 0}, "block_q=0: expected at least 1 token"),
        ({"block_k": 0}, "block_k=0: expected at least 1 token"),
        ({"local": -1}, "local=-1: expected at least 0 tokens"),
    ],
)
def test_bad_setting(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SALE(**settings)
