"""Prefix sharing against what it stands for: every response computed alone behind its prompt."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.prefix_sharing import PrefixSharing, prefix_layout, prefix_positions
from saccade.ops import block_attend
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def plain(q, k, v):
    """Causal softmax attention of `[H, N, D]`."""
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(torch.ones(q.shape[1], q.shape[1]).triu(1) > 0, -torch.inf)
    return scores.softmax(-1) @ v


def alone(q, k, v, lengths, tokens: int) -> torch.Tensor:
    """Output of one item `[H, N, D]`, response by response."""
    out, start = torch.empty_like(q), 0
    for row in [*lengths, [tokens - sum(map(sum, lengths))]]:
        prefix = list(range(start, start + row[0]))
        out[:, prefix] = plain(*(x[:, prefix] for x in (q, k, v)))
        first = start + row[0]
        for count in row[1:]:
            whole = prefix + list(range(first, first + count))
            out[:, first : first + count] = plain(*(x[:, whole] for x in (q, k, v)))[:, row[0] :]
            first += count
        start += sum(row)
    return out


def inputs(tokens: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, 2, tokens, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


PACKS = [(), ((5, 7, 3),), ((9, 4, 11), (0, 6, 2), (3, 1, 0, 8)), ((10,), (6, 20, 20))]


@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_every_response_is_as_if_alone(lengths: tuple, block: int) -> None:
    q, k, v = leaves = [x.requires_grad_() for x in inputs(61)]
    out = PrefixSharing(lengths, block)(q, k, v, geometry=CAUSAL)
    wanted = torch.stack([alone(q[b], k[b], v[b], lengths, 61) for b in (0, 1)])
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, gradient in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-11)


def test_each_item_its_own_packing() -> None:
    q, k, v = inputs(61)
    packs = [PACKS[2], PACKS[3]]
    out = block_attend(q, k, v, prefix_layout(packs, 61, block=8))
    wanted = torch.stack([alone(q[b], k[b], v[b], packs[b], 61) for b in (0, 1)])
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)


def test_known_by_hand() -> None:
    """A prompt of 2, responses of 2 and 1."""
    mask = prefix_layout([[(2, 2, 1)]], 5, block=2).to_dense()[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert prefix_positions([(2, 2, 1), (1, 2)], 9).tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 0]


def test_the_prompt_is_computed_once() -> None:
    """Fewer pairs than for each response alone: the prompt's triangle is saved."""
    pairs = int(prefix_layout([[(40, 10, 20)]], 70).pairs())
    assert pairs == 50 * 51 // 2 + 60 * 61 // 2 - 40 * 41 // 2


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"lengths=\(3, -1\): expected a prefix and branches of at least 0 tokens"):
        PrefixSharing(((3, -1),))
    with pytest.raises(ValueError, match="block=0: expected at least 1 token"):
        PrefixSharing(block=0)
    q, k, v = inputs(7)
    with pytest.raises(ValueError, match=r"lengths=\(\(5, 2, 1\),\): expected at most 7 tokens, it has 8"):
        PrefixSharing(((5, 2, 1),))(q, k, v, geometry=CAUSAL)


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    q, k, v = inputs(tokens)
    out = PrefixSharing()(q, k, v, geometry=CAUSAL)
    torch.testing.assert_close(out, v, rtol=0, atol=1e-12)
