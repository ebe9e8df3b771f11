"""What the tuner tries."""

from __future__ import annotations

import pytest
import torch

from saccade.catalog import cards
from saccade.kernels import cpu
from saccade.ops import attend
from saccade.tune.candidates import Candidate, dense_candidate, fast_dtype, find_candidates, rounded
from saccade.types import Kind


def test_every_mechanism_is_a_candidate_or_left_out_with_a_reason():
    found, left_out = find_candidates(1024)
    assert {c.mechanism for c in found} | set(left_out) == {card.name for card in cards()}
    assert all(left_out.values())
    assert all(card.kind is Kind.SELECTOR for card in cards() if card.name in {c.mechanism for c in found})


def test_candidates_can_be_built_and_have_distinct_keys():
    found, _ = find_candidates(1024)
    assert len({c.key for c in found}) == len(found)
    for candidate in found:
        assert candidate.build().card.name == candidate.mechanism


def test_only_the_named_ones():
    found, left_out = find_candidates(1024, ["sink_window"])
    assert {c.mechanism for c in found} == {"sink_window"}
    assert left_out["moba"] == "not asked for"


def test_errors_name_the_mechanism():
    with pytest.raises(ValueError, match="unknown mechanism 'sink_windw'; did you mean 'sink_window'"):
        find_candidates(1024, ["sink_windw"])
    with pytest.raises(ValueError, match="mechanisms='pab': cannot be tuned: "):
        find_candidates(1024, ["pab"])
    with pytest.raises(ValueError, match="mechanism='dense': expected a registered mechanism"):
        Candidate("dense").build()


def test_label_shows_the_settings():
    assert Candidate("dense").label == "dense"
    assert Candidate("sink_window", {"window": 4, "sinks": 1}).label == "sink_window(window=4, sinks=1)"


def test_candidates_rounded_to_a_dtype():
    window = Candidate("sink_window", {"window": 4})
    assert rounded([window], None) == [window]
    dense, narrow = rounded([window], "bfloat16")
    assert dense.label == "dense(engine=saccade) in bfloat16"
    assert narrow.label == "sink_window(window=4) in bfloat16"
    assert len({window.key, narrow.key, dense.key}) == 3
    q, k, v = torch.randn(3, 1, 2, 32, 8, generator=torch.Generator().manual_seed(0))
    out = dense.attention()(q, k, v, None)
    exact = Candidate("dense").attention()(q, k, v, None)
    assert out.dtype == torch.float32
    assert torch.equal(out, attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True).float())
    assert 1e-4 < float((out - exact).norm() / exact.norm()) < 1e-2
    wide = Candidate("sink_window", {"window": 32, "block": 16}, "bfloat16").attention()(q, k, v, None)
    assert float((wide - exact).norm() / exact.norm()) < 1e-2


def test_attention_is_rounded_only_where_that_is_faster_and_the_model_is_wider():
    model = torch.nn.Linear(1, 1)
    model.dtype, model.device = torch.float32, torch.device("cpu")
    engine = cpu.missing() is None and "bf16" in cpu.instruction_set()
    assert fast_dtype(model) == ("bfloat16" if engine else None)
    model.dtype = torch.bfloat16
    assert fast_dtype(model) is None


def test_dense_attention_is_on_the_engine_that_has_a_kernel_of_its_own():
    expected = {} if cpu.missing() else {"engine": "saccade"}
    assert dense_candidate("cpu") == Candidate("dense", expected)
