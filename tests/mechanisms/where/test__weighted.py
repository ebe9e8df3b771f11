"""Keys that stand for several, and merging over the first queries only."""

from __future__ import annotations

import torch

from saccade.mechanisms.where._weighted import attend_weighted, merge_first
from saccade.types import AttentionOutput, BlockLayout


def test_a_weight_is_as_many_equal_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64) for n in (5, 3, 3))
    counts = torch.tensor([1, 4, 2])
    repeated = [x.repeat_interleave(counts, 2) for x in (k, v)]
    scores = q @ repeated[0].mT / 3
    for layout in (None, BlockLayout.dense(5, 3, block=2)):
        out, lse = attend_weighted(q, k, v, counts, layout, 1 / 3, "auto")
        torch.testing.assert_close(out, scores.softmax(-1) @ repeated[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)


def test_further_queries_keep_what_they_have() -> None:
    whole = AttentionOutput(torch.ones(1, 1, 3, 2), torch.zeros(1, 1, 3))
    part = AttentionOutput(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2))
    out, lse = merge_first(whole, [part])
    assert out[0, 0, :, 0].tolist() == [0.5, 0.5, 1.0]
    torch.testing.assert_close(lse[0, 0], torch.tensor([2.0, 2.0, 1.0]).log())
    assert merge_first(whole, []) is whole
