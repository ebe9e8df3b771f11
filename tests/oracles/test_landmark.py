"""Decoding with landmarks against loops over retrieved blocks, and against the grouped softmax where all are read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import compose
from saccade.mechanisms.cache.landmark import Landmark
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.scores.landmark_softmax import LandmarkSoftmax
from saccade.types import Geometry


def decoded(q: Tensor, k: Tensor, v: Tensor, block: int, blocks: int) -> tuple[Tensor, int]:
    """Output of the last token, with query `[D]`, over keys `[n, D]`, and how many tokens it reads."""
    scores, last = (k @ q / math.sqrt(len(q))).tolist(), len(k) - 1
    start = last // block * block
    earlier = sorted(range(0, start, block), key=lambda first: -scores[first + block - 1])[:blocks]
    own = [j for j in range(start, last + 1) if j % block != block - 1]
    total = sum(math.exp(scores[j]) for j in own) + sum(math.exp(scores[first + block - 1]) for first in earlier)
    out = sum(math.exp(scores[j]) / total * v[j] for j in own)
    for first in earlier:
        members = range(first, first + block - 1)
        inside = sum(math.exp(scores[j]) for j in members)
        share = math.exp(scores[first + block - 1]) / total
        out = out + sum(share * math.exp(scores[j]) / inside * v[j] for j in members)
    return out, len(own) + len(earlier) * (block - 1)


def inputs(heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 5))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def steps(policy, q: Tensor, k: Tensor, v: Tensor, prompt: int, **options) -> tuple[Tensor, CachedAttention]:
    layer = CachedAttention(policy)
    sizes = [prompt] + [1] * (q.shape[2] - prompt)
    parts = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    return torch.cat([layer(*part, **options) for part in parts][1:], 2), layer


@pytest.mark.parametrize(
    ("heads", "groups", "block", "blocks", "prompt"), [(4, 2, 5, 2, 13), (2, 2, 2, 3, 1), (3, 1, 7, 1, 20)]
)
def test_matches_the_oracle(heads: int, groups: int, block: int, blocks: int, prompt: int) -> None:
    q, k, v = inputs(heads, groups, 30)
    out, layer = steps(Landmark(block=block, blocks=blocks), q, k, v, prompt)
    share, counts = heads // groups, set()
    for b in range(2):
        for h in range(heads):
            for i in range(prompt, 30):
                past = (x[b, h // share, : i + 1] for x in (k, v))
                expected, count = decoded(q[b, h, i], *past, block, blocks)
                torch.testing.assert_close(out[b, h, i - prompt], expected, rtol=0, atol=1e-12)
                counts.add(count)
    earlier, key, token = 29 // block, 8 * 8, (8 + 5) * 8
    read = min(blocks, earlier) * (block - 1)
    choosing = 2 * groups * earlier * key + 2 * heads * read * key
    assert layer.bytes_read == 2 * heads * (read + 29 % block + (29 % block != block - 1)) * token + choosing
    assert layer.kept.complete


def test_with_all_blocks_it_is_the_grouped_softmax() -> None:
    q, k, v = inputs(4, 2, 26)
    out, _ = steps(Landmark(block=4, blocks=9), q, k, v, 10)
    whole = LandmarkSoftmax(block=4)(q, k, v, geometry=Geometry(causal=True))
    torch.testing.assert_close(out, whole[:, :, 10:], rtol=0, atol=1e-12)


def test_scale_and_left_padding() -> None:
    q, k, v = inputs(2, 1, 24)
    present = torch.ones(2, 15, dtype=torch.bool)
    present[1, :6] = False
    policy = Landmark(block=3, blocks=2)
    padded, alone = CachedAttention(policy), CachedAttention(policy)
    padded(*(x[:, :, :15] for x in (q, k, v)), present=present, scale=0.7)
    alone(*(x[1:, :, 6:15] for x in (q, k, v)), scale=0.7)
    for i in range(15, 24):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        out = padded(*token, scale=0.7)
        torch.testing.assert_close(out[1:], alone(*(x[1:] for x in token), scale=0.7), rtol=0, atol=1e-12)
        expected, _ = decoded(q[0, 1, i] * 0.7 * math.sqrt(8), k[0, 0, : i + 1], v[0, 0, : i + 1], 3, 2)
        torch.testing.assert_close(out[0, 1, 0], expected, rtol=0, atol=1e-12)


def test_evicted_tokens_and_bad_settings_are_refused() -> None:
    q, k, v = inputs(2, 2, 20)
    policy = compose(keep=SinkRecent(sinks=2, recent=5), read=Landmark(block=4))
    with pytest.raises(ValueError, match="keep='tokens were evicted': expected a policy that keeps all, landmarks"):
        steps(policy, q, k, v, 12)
    with pytest.raises(ValueError, match="block=1: expected at least 2, a token and its landmark"):
        Landmark(block=1)
    with pytest.raises(ValueError, match="blocks=0: expected at least 1 block"):
        Landmark(blocks=0)
    with pytest.raises(ValueError, match="dense_layers=-1: expected at least 0 layers"):
        Landmark(dense_layers=-1)
