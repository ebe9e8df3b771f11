"""KIVI against plain loops: each key channel of a group and each value quantised one number at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import compose
from saccade.mechanisms.cache.kivi import Kivi
from saccade.mechanisms.cache.sink_recent import SinkRecent

pytestmark = pytest.mark.quick


def through_codes(numbers: list[float], bits: int) -> list[float]:
    """Asymmetric quantisation and back."""
    low, high = min(numbers), max(numbers)
    scale = (high - low) / (2**bits - 1)
    return [low + round((x - low) / scale) * scale for x in numbers] if scale > 0 else numbers


def oracle(
    q: Tensor, k: Tensor, v: Tensor, chunks: list[int], bits: int, group: int, recent: int, channels: int
) -> Tensor:
    """One head after the other; the keys and values as a later call sees them are rewritten in place."""
    batch, heads, tokens, dim = q.shape
    share = heads // k.shape[1]
    k, v, out = k.clone(), v.clone(), torch.zeros(batch, heads, tokens, v.shape[3], dtype=q.dtype)
    start = packed = 0
    for size in chunks:
        for b in range(batch):
            for h in range(heads):
                for i in range(start, start + size):
                    scores = [float(q[b, h, i] @ k[b, h // share, j]) / math.sqrt(dim) for j in range(i + 1)]
                    total = sum(math.exp(s) for s in scores)
                    for j, s in enumerate(scores):
                        out[b, h, i] += math.exp(s) / total * v[b, h // share, j]
        start += size
        while start - packed >= recent + group:
            rows = range(packed, packed + group)
            for b in range(batch):
                for g in range(k.shape[1]):
                    for c in range(dim):
                        new = through_codes([float(k[b, g, j, c]) for j in rows], bits)
                        for j, x in zip(rows, new, strict=True):
                            k[b, g, j, c] = x
                    for j in rows:
                        for c in range(0, v.shape[3], channels):
                            new = through_codes([float(x) for x in v[b, g, j, c : c + channels]], bits)
                            v[b, g, j, c : c + channels] = torch.tensor(new, dtype=v.dtype)
            packed += group
    return out


def inputs(batch: int, heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, 8), (batch, groups, tokens, 8), (batch, groups, tokens, 12))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("heads", "groups", "chunks", "bits", "group", "recent", "channels"),
    [
        (2, 2, [1] * 15, 2, 4, 3, 12),
        (4, 2, [13, 1, 1, 1, 5, 1], 2, 4, 4, 4),
        (2, 1, [9, 6, 1, 1], 4, 3, 0, 6),
        (2, 2, [11, 1, 1], 8, 2, 2, 3),
        (2, 1, [7, 1, 1], 2, 4, 40, 4),
    ],
)
def test_matches_the_oracle(
    heads: int, groups: int, chunks: list[int], bits: int, group: int, recent: int, channels: int
) -> None:
    q, k, v = inputs(2, heads, groups, sum(chunks))
    expected = oracle(q, k, v, chunks, bits, group, recent, channels)
    layer = CachedAttention(Kivi(bits=bits, group=group, recent=recent, channels=channels))
    parts = zip(q.split(chunks, 2), k.split(chunks, 2), v.split(chunks, 2), strict=True)
    out = torch.cat([layer(*part) for part in parts], 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)  # scales are kept in fp32


def test_by_hand() -> None:
    """Keys of 0, so that a step averages values; 0.4 of 0 .. 3 becomes 0 in two bits, and the recent token stays."""
    k = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    v = torch.tensor([[0.0, 0.4, 1.6, 3.0], [0.5, 0.5, 0.5, 0.7]], dtype=torch.float64).view(1, 1, 2, 4)
    layer = CachedAttention(Kivi(bits=2, group=1, recent=0, channels=None))
    layer(k[:, :, :1], k[:, :, :1], v[:, :, :1])
    out = layer(k[:, :, 1:], k[:, :, 1:], v[:, :, 1:])
    expected = (torch.tensor([0.0, 0.0, 2.0, 3.0]) + torch.tensor([0.5, 0.5, 0.5, 0.7])) / 2
    torch.testing.assert_close(out.flatten(), expected.double(), rtol=0, atol=1e-6)


def test_bytes_fall_and_padding_is_not_stored() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 200, 64).to(torch.bfloat16)
    present = torch.ones(2, 190, dtype=torch.bool)
    present[0, :40] = False
    layer = CachedAttention(Kivi(bits=2, group=16, recent=16, channels=None))
    layer(q[:, :, :190], k[:, :, :190], v[:, :, :190], present=present)
    assert layer.kept.lengths.tolist() == [[22, 22], [30, 30]]
    assert layer.kept.tokens == 2 * (150 + 190)
    assert layer.nbytes < 2 * (150 + 190) * 128 * 2 * 0.4
    padded = layer(q[:, :, 190:191], k[:, :, 190:191], v[:, :, 190:191])
    alone = CachedAttention(Kivi(bits=2, group=16, recent=16, channels=None))
    alone(q[:1, :, 40:190], k[:1, :, 40:190], v[:1, :, 40:190])
    single = alone(q[:1, :, 190:191], k[:1, :, 190:191], v[:1, :, 190:191])
    torch.testing.assert_close(padded[:1], single)


def test_forks_and_crops() -> None:
    q, k, v = inputs(1, 2, 2, 20)
    layer = CachedAttention(Kivi(bits=4, group=4, recent=4, channels=None))
    layer(q[:, :, :18], k[:, :, :18], v[:, :, :18])
    other = CachedAttention(layer.policy)
    other.kept = layer.kept.select(torch.tensor([0, 0]))
    twice = [x[:, :, 18:19].expand(2, -1, -1, -1) for x in (q, k, v)]
    out = other(*twice)
    torch.testing.assert_close(out[:1], out[1:], rtol=0, atol=0)
    torch.testing.assert_close(layer(q[:, :, 18:19], k[:, :, 18:19], v[:, :, 18:19]), out[:1])
    assert not layer.kept.complete
    with pytest.raises(ValueError, match="count=9: expected at most 7, the tokens that are not packed yet"):
        layer.kept.crop(9)
    layer.kept.crop(2)
    assert layer.kept.seen.tolist() == [17]


def test_refusals() -> None:
    q, k, v = inputs(1, 2, 2, 8)
    for settings, message in (
        ({"bits": 3}, "bits=3: expected 2, 4 or 8"),
        ({"group": 0}, "group=0: expected at least 1 token"),
        ({"recent": -1}, "recent=-1: expected at least 0 tokens"),
        ({"channels": 0}, "channels=0: expected at least 1 channel"),
    ):
        with pytest.raises(ValueError, match=message):
            Kivi(**settings)
    with pytest.raises(ValueError, match="channels=5: expected a divisor of the 12 value channels"):
        CachedAttention(Kivi(channels=5))(q, k, v)
    with pytest.raises(ValueError, match="expected whole bytes"):
        CachedAttention(Kivi(group=1, channels=None))(q[..., :3], k[..., :3], v)
    with pytest.raises(ValueError, match="no policy that evicts or selects"):
        compose(keep=SinkRecent(), store=Kivi())
    assert compose(store=Kivi(bits=4)) == Kivi(bits=4)
