"""The grouped softmax of Landmark Attention against loops over the paper's groups, with gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.scores.landmark_softmax import LandmarkSoftmax
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def weights_of(scores: list[float], block: int) -> list[float]:
    """Of the last token over itself and all before it, by the paper's equation 2 and 3.

    p_j ends the block of j. Token j is in the group of p_j; a landmark of another block is in the group of p_i; the
    landmark of the own block is in none.
    """
    i = len(scores) - 1
    ends = [(j // block + 1) * block - 1 for j in range(i + 1)]
    groups = [-1 if j == ends[i] else ends[i] if j == ends[j] else ends[j] for j in range(i + 1)]
    shares = []
    for j in range(i + 1):
        total = sum(math.exp(scores[m]) for m in range(i + 1) if groups[m] == groups[j])
        shares.append(0.0 if groups[j] == -1 else math.exp(scores[j]) / total)
    return [
        0.0 if j == ends[j] else shares[j] if ends[j] == ends[i] else shares[j] * shares[ends[j]] for j in range(i + 1)
    ]


def oracle(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    batch, heads, queries, dim = q.shape
    share, before = heads // k.shape[1], k.shape[2] - queries
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                seen = before + i + 1
                scores = (k[b, h // share, :seen] @ q[b, h, i] / math.sqrt(dim)).tolist()
                row = torch.tensor(weights_of(scores, block), dtype=q.dtype)
                out[b, h, i] = row @ v[b, h // share, :seen]
    return out


def inputs(heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 5))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize(("heads", "groups", "tokens", "block"), [(2, 1, 23, 5), (3, 3, 16, 4), (2, 2, 9, 2)])
def test_matches_the_oracle(heads: int, groups: int, tokens: int, block: int) -> None:
    q, k, v = inputs(heads, groups, tokens)
    mechanism = LandmarkSoftmax(block=block)
    expected = oracle(q, k, v, block)
    torch.testing.assert_close(mechanism(q, k, v, geometry=CAUSAL), expected, rtol=0, atol=1e-12)
    late = mechanism(q[:, :, -3:], k, v, geometry=CAUSAL)
    torch.testing.assert_close(late, expected[:, :, -3:], rtol=0, atol=1e-12)


def test_packed_sequences_have_blocks_of_their_own() -> None:
    q, k, v = inputs(2, 1, 20)
    ids = torch.tensor([[-1] * 3 + [0] * 17, [0] * 9 + [1] * 11])
    geometry = Geometry(causal=True, q_segments=ids, kv_segments=ids)
    out = LandmarkSoftmax(block=4)(q, k, v, geometry=geometry)
    for row, first, stop in ((0, 3, 20), (1, 0, 9), (1, 9, 20)):
        part = [x[row : row + 1, :, first:stop] for x in (q, k, v)]
        torch.testing.assert_close(out[row : row + 1, :, first:stop], oracle(*part, 4), rtol=0, atol=1e-12)
    assert bool((out[0, :, :3] == 0).all())


def test_weights_sum_to_one_and_landmarks_get_none() -> None:
    scores = torch.randn(1, 2, 14, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(14, 14, dtype=torch.bool).tril()
    weights = LandmarkSoftmax(block=4).normalise(scores, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 14, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool((weights[..., 3::4] == 0).all())


def test_gradients_are_those_of_the_equations() -> None:
    scores = torch.randn(11, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    mask = torch.ones(11, 11, dtype=torch.bool).tril()

    def weights(x: Tensor) -> Tensor:
        return LandmarkSoftmax(block=3).normalise(x[None, None], mask)

    assert torch.autograd.gradcheck(weights, (scores,))


def test_by_hand() -> None:
    """Blocks {1, 2, L}, {3, ...}: equal scores give the own token 1/2, tokens 1 and 2 a quarter each."""
    weights = LandmarkSoftmax(block=3).normalise(torch.zeros(1, 1, 1, 4), torch.ones(1, 4, dtype=torch.bool))
    assert weights.flatten().tolist() == [0.25, 0.25, 0, 0.5]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="block=1: expected at least 2, a token and its landmark"):
        LandmarkSoftmax(block=1)
