"""Arrow attention against a per-pair mask and a softmax whose first row is scaled by log length."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.where.arrow import Arrow
from saccade.types import Geometry


def oracle(q, k, v, window, scaling=True, ids=None):
    """Row by row; `ids` is a list of segment ids of each sequence."""
    batch, heads, tokens, dim = q.shape
    shared = heads // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(batch):
        row = [0] * tokens if ids is None else ids[b]
        for i in range(tokens):
            mine = [j for j in range(tokens) if row[j] == row[i] and row[i] >= 0]
            if not mine:
                continue
            seen = mine if i == mine[0] else [j for j in mine if abs(i - j) <= window or j == mine[0]]
            factor = math.log(len(mine), 512) if scaling and i == mine[0] else 1.0
            for h in range(heads):
                keys, values = k[b, h // shared, seen], v[b, h // shared, seen]
                out[b, h, i] = torch.softmax(factor * keys @ q[b, h, i] / dim**0.5, 0) @ values
    return out


def inputs(tokens, batch=2, heads=4, groups=2):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, tokens, 8, dtype=torch.float64)
    return q, *(torch.randn(batch, groups, tokens, 8, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("scaling", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 30, 67])
@pytest.mark.parametrize(("window", "block"), [(0, 8), (5, 8), (9, 16), (100, 4)])
def test_equals_the_paper(window, block, tokens, scaling):
    q, k, v = inputs(tokens)
    out = Arrow(window, scaling, block)(q, k, v)
    torch.testing.assert_close(out, oracle(q, k, v, window, scaling), rtol=0, atol=1e-10)


def test_every_packed_sequence_has_its_own_first_token():
    ids = [[0] * 13 + [1] * 20, [-1] * 6 + [0] * 9 + [3] * 18]
    q, k, v = inputs(33)
    geometry = Geometry(q_segments=torch.tensor(ids), kv_segments=torch.tensor(ids))
    out = Arrow(3, block=8)(q, k, v, geometry=geometry)
    torch.testing.assert_close(out, oracle(q, k, v, 3, ids=ids), rtol=0, atol=1e-10)


def test_known_pattern():
    mask = Arrow(1, block=2).pattern(*[torch.zeros(1, 1, 5, 4)] * 2).to_dense()[0, 0]
    assert mask.int().tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1], [1, 0, 0, 1, 1]]


def test_at_512_tokens_the_scores_are_not_scaled():
    q, k, v = (x.float() for x in inputs(512, 1, 1, 1))
    torch.testing.assert_close(Arrow(4)(q, k, v), Arrow(4, length_scaling=False)(q, k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"), [({"window": -1}, "window=-1: expected"), ({"block": 0}, "block=0: expected")]
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Arrow(**settings)
