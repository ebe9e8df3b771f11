"""PBS-Attn against the paper: keys really are permuted here, and causality follows their places."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where.pbs_attn import PBSAttn
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def random_qkv(batch: int, heads: int, groups: int, tokens: int, dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, dim), (batch, groups, tokens, dim), (batch, groups, tokens, dim + 1))
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def permutation(q: Tensor, k: Tensor, m: PBSAttn) -> list[int]:
    """Keys of each whole segment by falling mean attention of the last block of queries."""
    tokens = len(k)
    whole = tokens // m.segment * m.segment
    scores = (q[-m.block :] @ k[:whole].T / math.sqrt(q.shape[1])).exp()
    importance = (scores / scores.sum(1, keepdim=True)).mean(0).tolist() if whole else []
    order: list[int] = []
    for start in range(0, whole, m.segment):
        order += sorted(range(start, start + m.segment), key=lambda j: -importance[j])
    return order + list(range(whole, tokens))


def oracle(q: Tensor, k: Tensor, v: Tensor, m: PBSAttn) -> Tensor:
    """Output of one head by attention over permuted keys and values."""
    tokens, root = len(k), math.sqrt(q.shape[1])
    order = permutation(q, k, m)
    moved_k, moved_v, place = k[order], v[order], torch.tensor(order)
    key_blocks, ratio = moved_k.split(m.block), m.segment // m.block
    out = torch.zeros(tokens, v.shape[1], dtype=v.dtype)
    for r, rows in enumerate(q.split(m.block)):
        own = r // ratio
        scores = [math.exp(float(rows.mean(0) @ key_blocks[c].mean(0)) / root) for c in range(own * ratio)]
        kept, mass = set(range(own * ratio, r // ratio * ratio + ratio)), 0.0
        for c in sorted(range(len(scores)), key=lambda c: -scores[c]):
            if mass >= m.threshold and m.threshold < 1:
                break
            kept.add(c)
            mass += scores[c] / sum(scores)
        if m.sink:
            kept.add(order.index(0) // m.block)
        chosen = torch.tensor([place // m.block in kept for place in range(tokens)])
        for i in range(r * m.block, r * m.block + len(rows)):
            seen = chosen & (place <= i)
            out[i] = (q[i] @ moved_k[seen].T / root).softmax(0) @ moved_v[seen]
    return out


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 4, 2, 48), {"threshold": 0.6, "block": 4, "segment": 8}),
        ((1, 3, 1, 37), {"threshold": 0.3, "block": 5, "segment": 10}),
        ((1, 2, 2, 40), {"threshold": 0.8, "block": 4, "segment": 4, "sink": False}),
        ((1, 2, 1, 21), {"threshold": 0.5, "block": 8, "segment": 32}),
        ((1, 2, 1, 50), {"threshold": 1.0, "block": 4, "segment": 16}),
    ],
)
def test_paper_form(shape: tuple[int, ...], settings: dict[str, float]) -> None:
    q, k, v = random_qkv(*shape)
    m, share = PBSAttn(**settings), shape[1] // shape[2]
    expected = torch.stack([torch.stack([oracle(q[b, h], k[b, h // share], v[b, h // share], m)
                                         for h in range(shape[1])]) for b in range(shape[0])])  # fmt: skip
    m.pattern(q, k, CAUSAL).validate()
    torch.testing.assert_close(m(q, k, v, geometry=CAUSAL), expected, atol=1e-10, rtol=0)


def test_known_by_hand() -> None:
    """Segments of 4 in blocks of 2: keys 1 and 3 matter to the last query, so they share a block and are kept."""
    k = torch.tensor([0.0, 9.0, 0.0, 8.0, 0.0, 0.0]).view(1, 1, 6, 1)
    q = torch.ones(1, 1, 6, 1)
    chosen = PBSAttn(threshold=0.9, block=2, segment=4, sink=False).pattern(q, k, CAUSAL).to_dense()[0, 0].int()
    expected = ["100000", "110000", "111000", "111100", "010110", "010111"]
    assert ["".join(str(int(x)) for x in row) for row in chosen] == expected


def test_sorting_gathers_scattered_keys() -> None:
    """Half of each old segment matters: sorted blocks hold dense attention in half the pairs, unsorted ones cannot."""
    generator = torch.Generator().manual_seed(0)
    tokens, dim = 256, 8
    k = 0.1 * torch.randn(1, 1, tokens, dim, generator=generator)
    k[:, :, ::4, 0] += 8.0
    q = 0.1 * torch.randn(1, 1, tokens, dim, generator=generator)
    q[..., 0] += 2.0
    v = torch.randn(1, 1, tokens, dim, generator=generator)
    dense = attention(q, k, v)
    small = PBSAttn(threshold=0.9, block=16, segment=64)
    plain = PBSAttn(threshold=0.35, block=16, segment=16)
    densities = [m.pattern(q, k, CAUSAL).density() for m in (small, plain)]
    errors = [float((m(q, k, v, geometry=CAUSAL) - dense).norm() / dense.norm()) for m in (small, plain)]
    assert densities[0] < densities[1]
    assert errors[0] < 0.5 * errors[1]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1) @ v


def test_later_queries_choose_for_earlier_ones() -> None:
    """What the card says of prefill: this is why law 4 is not asked of it."""
    q, k, _ = random_qkv(1, 1, 1, 64)
    changed = q.clone()
    changed[:, :, -4:] *= -1
    m = PBSAttn(threshold=0.5, block=4, segment=8)
    before, after = (m.pattern(x, k, CAUSAL).to_dense()[:, :, :32] for x in (q, changed))
    assert not torch.equal(before, after)
    assert "outputs of earlier tokens depend on later ones" in m.card.prefill_only


def test_only_whole_prompts() -> None:
    q, k, v = random_qkv(1, 2, 1, 32)
    message = "8 queries and 32 keys: expected as many, pbs_attn is for prefill only: the last block of queries orders"
    with pytest.raises(ValueError, match=message):
        PBSAttn()(q[:, :, -8:], k, v, geometry=CAUSAL)


def test_no_tokens() -> None:
    q, k, v = random_qkv(1, 2, 1, 0)
    assert PBSAttn()(q, k, v, geometry=CAUSAL).shape == (1, 2, 0, 9)


@pytest.mark.parametrize("tokens", [64, 256])
def test_ladder_rises(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens)
    kept = [PBSAttn(**s).pattern(q, k, CAUSAL).density() for s in PBSAttn.card.ladder(tokens)]
    assert all(low < high for low, high in zip(kept, kept[1:], strict=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, r"threshold=0.0: expected a fraction in \(0, 1\]"),
        ({"block": 0}, "block=0: expected at least 1 token"),
        ({"segment": 130}, "segment=130: expected a positive multiple of block=128"),
    ],
)
def test_bad_setting(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PBSAttn(**settings)
