"""Damage, errors and times of candidates on one layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saccade.ops import attend
from saccade.tune.candidates import Candidate
from saccade.tune.score import (
    FOCUS_SHARE,
    CandidateScore,
    LayerInputs,
    compare_outputs,
    hopeless,
    sample,
    score_layer,
)
from saccade.types import BlockLayout, Geometry, TokenIndex

pytestmark = pytest.mark.quick


def make_inputs(tokens=128, heads=4, groups=2, dim=8, mixing=True):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, tokens, dim, generator=generator) for h in (heads, groups, groups))
    weight = torch.randn(24, heads * dim, generator=generator) if mixing else None
    residual = torch.rand(tokens, generator=generator) + 1 if mixing else None
    focus = torch.zeros(tokens, dtype=torch.bool)
    focus[-3:] = True
    return LayerInputs(q, k, v, dim**-0.5, weight, residual, focus)


def test_damage_is_the_relative_change_of_the_residual_stream():
    inputs = make_inputs()
    generator = torch.Generator().manual_seed(1)
    dense, out = (torch.randn(1, 4, 128, 8, generator=generator) for _ in range(2))
    errors, damage = compare_outputs(out, dense, inputs)
    for head in range(4):
        change = (out - dense)[0, head]
        moved = change @ inputs.mixing[:, head * 8 : head * 8 + 8].T
        relative = moved.square().sum(-1) / inputs.residual.square()
        wanted = (1 - FOCUS_SHARE) * relative.mean() + FOCUS_SHARE * relative[-3:].mean()
        assert damage[head] == pytest.approx(float(wanted), rel=1e-4)
        assert errors[head] == pytest.approx(float(change.norm() / dense[0, head].norm()), rel=1e-5)


def test_rounding_does_little_damage_and_is_dense():
    inputs = make_inputs()
    window = Candidate("sink_window", {"window": 64, "sinks": 0, "block": 16}, "bfloat16")
    _, dense, half = score_layer(inputs, [Candidate("dense", {"engine": "saccade"}, "bfloat16"), window])
    assert dense.density == [1.0] * 4
    assert 0 < max(dense.damage) < 1e-3
    assert min(half.damage) > 10 * max(dense.damage)


def test_full_budget_does_no_damage_and_less_does_more():
    inputs = make_inputs()
    steps = [Candidate("sink_window", {"window": n, "sinks": 0, "block": 16}) for n in (128, 64, 16)]
    dense, full, half, little = score_layer(inputs, steps)
    assert dense.density == [1.0] * 4
    assert dense.damage == [0.0] * 4
    assert max(full.damage) < 1e-9
    assert full.density == pytest.approx([1.0] * 4)
    assert sum(full.damage) < sum(half.damage) < sum(little.damage)
    assert max(little.density) < min(half.density)
    assert max(half.density) < 1
    assert all(score.seconds > 0 for score in (dense, full, half, little))


def test_without_a_known_projection_the_output_itself_is_compared():
    _, scored = score_layer(make_inputs(mixing=False), [Candidate("sink_window", {"window": 16, "block": 16})])
    assert min(scored.damage) > 0


def layer(*seconds):
    return [CandidateScore(value, 0.0, [0.5], [0.1], [0.1]) for value in seconds]


def test_a_candidate_slower_than_dense_attention_in_the_first_layers_is_not_scored_again():
    steady, once = layer(1.0, 0.5, 1.5, 1.5), layer(1.0, 0.5, 1.4, 0.9)
    assert hopeless([steady]) == {}
    found = hopeless([steady, once])
    assert list(found) == [2]
    assert found[2].seconds == 1.4
    assert not found[2].measured


def test_skipped_candidates_keep_their_place():
    steps = [Candidate("sink_window", {"window": 16, "block": 16}), Candidate("moba", {"chunk": 16, "topk": 1})]
    history = [layer(1e-9, 1.0, 1e-12)] * 2
    dense, window, moba = score_layer(make_inputs(), steps, history)
    assert dense.measured
    assert moba.measured
    assert window == replace(history[-1][1], measured=False)


def test_a_sample_is_every_fourth_stretch_from_the_last():
    layout = BlockLayout.window(1000, 1000, 300, 0, block=64)
    part, tokens, work = sample(layout)
    wanted = torch.cat([torch.arange(first, min(first + 128, 1000)) for first in (384, 896)])
    assert torch.equal(tokens, wanted)
    assert torch.equal(part.to_dense()[0, 0], layout.to_dense()[0, 0, wanted])
    assert work == pytest.approx(len(layout.indices) / len(part.indices))


def test_lists_of_keys_are_taken_whole():
    index = TokenIndex(torch.zeros(1, 1, 300, 1, dtype=torch.int64), 300, 300)
    assert sample(index) == (index, slice(None), 1.0)


def test_a_sampled_damage_is_that_of_the_sampled_queries():
    inputs = make_inputs(tokens=700)
    candidate = Candidate("sink_window", {"window": 64, "sinks": 0, "block": 16})
    _, scored = score_layer(inputs, [candidate])
    tokens = torch.cat([torch.arange(128, 256), torch.arange(640, 700)])
    k, v = (x.repeat_interleave(2, 1) for x in (inputs.k, inputs.v))
    place = torch.arange(700)
    away = place[:, None] - place
    seen = {"dense": away >= 0, "window": (away >= 0) & (away < 64)}
    out = {
        name: (inputs.q @ k.transpose(2, 3) * inputs.scale).masked_fill(~mask, -torch.inf).softmax(-1) @ v
        for name, mask in seen.items()
    }
    change = (out["window"] - out["dense"])[0, :, tokens]
    for head in range(4):
        moved = change[head] @ inputs.mixing[:, head * 8 : head * 8 + 8].T
        relative = moved.square().sum(-1) / inputs.residual[tokens].square()
        wanted = (1 - FOCUS_SHARE) * relative.mean() + FOCUS_SHARE * relative[-3:].mean()
        assert scored.damage[head] == pytest.approx(float(wanted), rel=1e-3)


def test_a_mechanism_that_adds_stand_ins_is_scored_by_its_own_calls():
    inputs = make_inputs(tokens=300)
    settings = {"min_tokens": 32, "block": 16, "samples": 16}
    dense, scored = score_layer(inputs, [Candidate("hyper_attention", settings)])
    mechanism, geometry = Candidate("hyper_attention", settings).build(), Geometry(causal=True)
    out = mechanism(inputs.q, inputs.k, inputs.v, geometry=geometry, scale=inputs.scale)
    wanted = attend(inputs.q, inputs.k, inputs.v, causal=True, scale=inputs.scale)
    assert scored.errors == pytest.approx(compare_outputs(out, wanted, inputs)[0])
    assert 0 < scored.select_seconds < scored.seconds
    assert 0.2 < scored.density[0] < 1.0 == dense.density[0]
