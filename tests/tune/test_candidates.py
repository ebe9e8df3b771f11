"""What the tuner tries."""

from __future__ import annotations

import pytest

from saccade.catalog import cards
from saccade.kernels import cpu
from saccade.tune.candidates import Candidate, dense_candidate, find_candidates
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


def test_dense_attention_is_on_the_engine_that_has_a_kernel_of_its_own():
    expected = {} if cpu.missing() else {"engine": "saccade"}
    assert dense_candidate("cpu") == Candidate("dense", expected)
