"""What a cache holds, loses and takes on a layer's queries, keys and values."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.cache.storage import Storage
from saccade.plug import LayerCache, PolicyChoice
from saccade.tune.cache_score import CacheScore, score_caches, tail_length
from saccade.tune.caches import CacheCandidate
from saccade.tune.score import LayerInputs


def layer_inputs(tokens=256):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 8, generator=generator) for heads in (4, 2, 2))
    return LayerInputs(q, k, v, 8**-0.5, None, None, torch.zeros(tokens, dtype=torch.bool))


def test_scores_say_what_is_held_and_lost():
    tail = tail_length(256)
    whole = 256 - tail
    caches = [
        LayerCache(),
        LayerCache(keep=PolicyChoice("sink_recent", {"sinks": 0, "recent": whole // 2})),
        LayerCache(store=Storage(bits=8)),
        LayerCache(keep=PolicyChoice("h2o", {"heavy": whole, "recent": whole})),
        LayerCache(store=Storage(bits=4, group=3)),
    ]
    exact, half, codes, kept, refused = score_caches(layer_inputs(), [CacheCandidate(c) for c in caches], 0, 1)
    assert exact.damage == pytest.approx(0.0, abs=1e-9)
    assert 1.0 <= exact.share < 1.2  # positions, whole pages
    # what the tail attends to of the kept half, by plain softmax
    q, k, v = (x[0] for x in (layer_inputs().q, layer_inputs().k, layer_inputs().v))
    k, v = (x.repeat_interleave(2, 0) for x in (k, v))
    seen = torch.arange(256) <= torch.arange(whole, 256)[:, None]
    scores = (q[:, whole:] @ k.transpose(1, 2) * 8**-0.5).masked_fill(~seen, -torch.inf)
    dense = scores.softmax(-1) @ v
    cut = scores.masked_fill(torch.arange(256) <= whole - whole // 2, -torch.inf).softmax(-1) @ v
    expected = ((cut - dense).square().sum(-1) / dense.square().sum((0, 2))).mean(1).sum()
    assert half.damage == pytest.approx(float(expected), rel=1e-3)
    assert half.share < 0.75 * exact.share
    assert 0 < codes.damage < half.damage
    assert codes.share < 0.6 * exact.share
    assert kept.damage == pytest.approx(0.0, abs=1e-9)
    assert refused.refused == "group=3: expected a divisor of the 8 channels"
    assert CacheScore.from_json(codes.to_json()) == codes
    assert min(codes.seconds, codes.dense_seconds) > 0


def test_skipped_candidates_are_not_run():
    missing = LayerCache(keep=PolicyChoice("h2o", {"heavy": 8, "recent": 8}))
    candidates = [CacheCandidate(LayerCache()), CacheCandidate(missing)]
    exact, skipped = score_caches(layer_inputs(), candidates, 0, 1, {1: "needs weights"})
    assert exact.refused == ""
    assert skipped.refused == "needs weights"
    assert skipped.seconds == 0
