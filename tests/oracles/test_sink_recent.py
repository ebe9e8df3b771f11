"""StreamingLLM's cache against a dense softmax over the sinks-and-window mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.sink_recent import SinkRecent


def oracle(q: Tensor, k: Tensor, v: Tensor, sinks: int, recent: int) -> Tensor:
    """Row by row: tokens j < sinks or i - recent < j, all with j <= i."""
    batch, heads, tokens, dim = q.shape
    share = heads // k.shape[1]
    out = torch.zeros(batch, heads, tokens, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(tokens):
                seen = [j for j in range(i + 1) if j < sinks or j > i - recent]
                weights = (k[b, h // share, seen] @ q[b, h, i] / math.sqrt(dim)).softmax(0)
                out[b, h, i] = weights @ v[b, h // share, seen]
    return out


def inputs(heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 5))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize(("sinks", "recent"), [(2, 5), (0, 4), (3, 1), (4, 8), (1, 30)])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("chunks", [[19], [1] * 19, [3, 9, 1, 1, 5], [1, 18], [17, 1, 1]])
def test_whole_in_chunks_and_step_by_step(sinks: int, recent: int, heads: int, groups: int, chunks: list[int]) -> None:
    q, k, v = inputs(heads, groups, 19)
    layer = CachedAttention(SinkRecent(sinks=sinks, recent=recent))
    parts = zip(q.split(chunks, 2), k.split(chunks, 2), v.split(chunks, 2), strict=True)
    out = torch.cat([layer(*part) for part in parts], 2)
    torch.testing.assert_close(out, oracle(q, k, v, sinks, recent), rtol=0, atol=1e-10)
    kept = [j for j in range(19) if j < sinks or j > 19 - recent]
    layer.kept.sort()
    assert layer.kept.positions[1, groups - 1].tolist() == kept
    assert layer.nbytes == (2 * groups * (64 * (8 + 5) * 8 + 64 * 4) if kept else 0)


def test_exact_setting_is_dense() -> None:
    q, k, v = inputs(4, 2, 9)
    layer = CachedAttention(SinkRecent(**SinkRecent.card.exact(9)))
    torch.testing.assert_close(layer(q, k, v), oracle(q, k, v, 0, 9), rtol=0, atol=1e-10)


def test_by_hand() -> None:
    """Equal scores, so a row is the mean of the values it sees: tokens 0 and 3, 4 for the last."""
    k = torch.zeros(1, 1, 5, 2, dtype=torch.float64)
    v = torch.tensor([0.0, 1.0, 2.0, 3.0, 7.0], dtype=torch.float64).view(1, 1, 5, 1)
    layer = CachedAttention(SinkRecent(sinks=1, recent=2))
    out = layer(k, k, v).flatten()
    torch.testing.assert_close(out[2:], torch.tensor([1.0, 5 / 3, 10 / 3], dtype=torch.float64))
    layer.kept.sort()
    assert layer.kept.positions.flatten().tolist() == [0, 4]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="sinks=-1: expected at least 0 tokens"):
        SinkRecent(sinks=-1)
    with pytest.raises(ValueError, match="recent=0: expected at least 1 token"):
        SinkRecent(recent=0)
