"""`watch` gives the same weights in chunks of any size, to all probes."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.base import Probe
from saccade.mechanisms.probe.run import require_next, watch
from saccade.types import Geometry

pytestmark = pytest.mark.quick


class Recorder(Probe):
    """Keeps what it is shown."""

    def __init__(self):
        self.seen = []

    def observe(self, weights, mask, first_query, layer):
        self.seen.append((weights, mask.expand_as(weights), first_query, layer))

    def result(self):
        weights, masks = (torch.cat([chunk[part] for chunk in self.seen], 2) for part in (0, 1))
        return weights, masks


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("workspace", [1, 3000, 2**20])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (4, 9), (9, 4)])
def test_weights_are_softmax_whatever_the_chunk(causal, workspace, queries, keys):
    q, k = draw(2, 4, queries, 3), draw(2, 2, keys, 3, seed=1)
    first, second = Recorder(), Recorder()
    watch(q, k, [first, second], Geometry(causal=causal), layer=5, workspace=workspace)
    mask = torch.ones(queries, keys, dtype=torch.bool)
    mask = mask.tril(keys - queries) if causal else mask
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(3)
    expected = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0)
    for recorder in (first, second):
        weights, seen = recorder.result()
        torch.testing.assert_close(weights, expected)
        assert (seen == mask).all()
        assert recorder.seen[0][3] == 5
    starts = [chunk[2] for chunk in first.seen]
    assert starts == sorted(set(starts))
    assert workspace > 1 or len(starts) == queries


def test_segments_scale_and_poisoned_padding():
    q, k = draw(1, 2, 6, 3), draw(1, 2, 6, 3, seed=1)
    k[:, :, 0] = torch.nan
    segments = torch.tensor([[-1, 0, 0, 1, 1, 1]])
    recorder = Recorder()
    watch(q, k, recorder, Geometry(q_segments=segments, kv_segments=segments), scale=0.5)
    weights, mask = recorder.result()
    assert (mask[0, 0].sum(-1) == torch.tensor([0, 2, 2, 3, 3, 3])).all()
    assert (weights[:, :, 0] == 0).all()
    assert (weights[:, :, :, 0] == 0).all()
    torch.testing.assert_close(weights[:, :, 1:3, 1:3], (0.5 * q[:, :, 1:3] @ k[:, :, 1:3].mT).softmax(-1))


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match=r"k of shape \(1, 2, 3, 5\): expected batch 1 and head dim 4"):
        watch(draw(1, 2, 3, 4), draw(1, 2, 3, 5), Recorder())
    with pytest.raises(ValueError, match="first_query=4: expected 2, the next query of layer 1 that rollout"):
        require_next("rollout", 4, 2, 1)
