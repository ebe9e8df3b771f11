"""Composition equals doing the decisions one after another by hand; what is not defined is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from saccade.catalog import Card
from saccade.mechanisms.base import SELF_PATTERNS, Position
from saccade.mechanisms.compose import Attention
from saccade.mechanisms.heads.gqa import GQA
from saccade.mechanisms.heads.weighted_gqa import WeightedGQA
from saccade.mechanisms.scores.cog import Cog
from saccade.mechanisms.where.sink_window import SinkWindow
from saccade.types import Geometry, Kind

pytestmark = pytest.mark.quick


@dataclass(frozen=True)
class Turn(Position):
    """Plane rotation of two-dimensional heads by position / 8: dot products depend on distances only."""

    card: ClassVar[Card]

    def encode(self, x, positions):
        angle = positions.to(x.dtype) / 8
        angle = angle[None, None] if angle.ndim == 1 else angle[:, None]
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([x[..., 0] * cos - x[..., 1] * sin, x[..., 0] * sin + x[..., 1] * cos], -1)


Turn.card = Card(
    name="turn", kind=Kind.POSITION, target=Turn, room="positions", summary="", patterns=SELF_PATTERNS,
    supports=frozenset({"backward"}),
)  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(queries=7, keys=7, heads=4, groups=4, dim=2):
    return draw(2, heads, queries, dim), draw(2, groups, keys, dim, seed=1), draw(2, groups, keys, 3, seed=2)


def dense(q, k, v, mask):
    """Softmax attention under a bool mask `[M, N]`, the whole matrix at once."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.mT / math.sqrt(q.shape[3])
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def causal_mask(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def test_nothing_chosen_is_plain_attention_with_lse():
    q, k, v = inputs()
    out, lse = Attention()(q, k, v, geometry=Geometry(causal=True), return_lse=True)
    mask = causal_mask(7, 7)
    torch.testing.assert_close(out, dense(q, k, v, mask))
    scores = (q @ k.mT / math.sqrt(2)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_where_positions_and_heads_together():
    q, k, v = inputs(queries=9, keys=9)
    attention = Attention(where=SinkWindow(window=3, sinks=1, block=4), positions=Turn(), heads=GQA(2))
    out = attention(q, k, v, geometry=Geometry(causal=True))
    shared_k, shared_v = (x.reshape(2, 2, 2, 9, -1).mean(2) for x in (k, v))
    places = torch.arange(9)
    distance = places[:, None] - places
    mask = (distance >= 0) & ((distance < 3) | (places == 0))
    expected = dense(Turn().encode(q, places), Turn().encode(shared_k, places), shared_v, mask)
    torch.testing.assert_close(out, expected)


def test_score_and_heads_together():
    q, k, v = inputs()
    out = Attention(score=Cog(), heads=GQA(1))(q, k, v)
    shared_k, shared_v = k.mean(1, keepdim=True), v.mean(1, keepdim=True)
    scores = q @ shared_k.mT / math.sqrt(2)
    sizes = scores.abs().exp()
    torch.testing.assert_close(out, (scores.sign() * sizes / sizes.sum(-1, keepdim=True)) @ shared_v)


def test_queries_sit_at_the_end_of_the_keys_by_default():
    q, k, v = inputs(queries=3, keys=8)
    attention, geometry = Attention(positions=Turn()), Geometry(causal=True)
    out = attention(q, k, v, geometry=geometry)
    expected = dense(Turn().encode(q, torch.arange(5, 8)), Turn().encode(k, torch.arange(8)), v, causal_mask(3, 8))
    torch.testing.assert_close(out, expected)
    for places in (torch.arange(5, 8), torch.arange(5, 8).expand(2, 3)):
        torch.testing.assert_close(attention(q, k, v, geometry=geometry, q_positions=places), out)


def test_given_query_positions_are_used():
    q, k, v = inputs(queries=3, keys=8)
    places = torch.tensor([[1, 4, 2], [7, 0, 3]])
    out = Attention(positions=Turn())(q, k, v, geometry=Geometry(causal=True), q_positions=places)
    expected = dense(Turn().encode(q, places), Turn().encode(k, torch.arange(8)), v, causal_mask(3, 8))
    torch.testing.assert_close(out, expected)


def test_poisoned_padding_reaches_neither_output_nor_learned_weights():
    q, k, v = inputs()
    heads = WeightedGQA(4, 2, dtype=torch.float64)
    segments = torch.tensor([[-1, -1, 0, 0, 0, 0, 0]])
    geometry = Geometry(q_segments=segments, kv_segments=segments)
    clean = Attention(heads=heads)(q, k, v, geometry=geometry)
    k[:, :, :2], v[:, :, :2] = torch.nan, torch.inf
    out = Attention(heads=heads)(q, k, v, geometry=geometry)
    torch.testing.assert_close(out, clean, rtol=0, atol=0)
    out.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in heads.parameters())


def test_where_and_score_are_refused_together():
    with pytest.raises(ValueError, match="where='sink_window' with score='cog': expected one of the two"):
        Attention(where=SinkWindow(), score=Cog())


@pytest.mark.parametrize("name", ["where", "positions", "score", "heads"])
def test_a_member_of_the_wrong_kind_is_named(name):
    with pytest.raises(ValueError, match=rf"{name}='dense': expected a "):
        Attention(**{name: "dense"})


def test_what_a_member_does_not_support_is_refused():
    q, k, v = inputs()
    segments = torch.zeros(1, 7, dtype=torch.int64)
    with pytest.raises(ValueError, match="return_lse=True: cog does not support returning the log-sum-exp"):
        Attention(score=Cog())(q, k, v, return_lse=True)
    with pytest.raises(ValueError, match="q_segments: turn does not support packed sequences"):
        Attention(positions=Turn())(q, k, v, geometry=Geometry(q_segments=segments, kv_segments=segments))
    with pytest.raises(ValueError, match="causal=False with 3 queries and 7 keys: turn is defined for"):
        Attention(positions=Turn())(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="groups=3: expected a divisor of the 4 heads"):
        Attention(heads=GQA(3))(q, k, v)


def test_bad_query_positions_are_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="q_positions: expected None, because positions=None"):
        Attention()(q, k, v, q_positions=torch.arange(7))
    with pytest.raises(ValueError, match=r"q_positions of shape \(3,\): expected \[7\] or \[2, 7\]"):
        Attention(positions=Turn())(q, k, v, q_positions=torch.arange(3))
