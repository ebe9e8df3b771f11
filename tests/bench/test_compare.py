"""Comparing mechanisms on the same work."""

from __future__ import annotations

import re

import pytest
import torch

from saccade.bench import compare, parse_mechanism, random_problem


def test_rows_in_the_order_given_with_errors_that_fall():
    q, k, v = random_problem((1, 4, 2, 256, 16))
    result = compare(["sink_window:window=32", "sink_window:window=128", "sink_window:window=256"], q, k, v, rounds=1)
    assert [row.label for row in result.rows] == [f"sink_window(window={n})" for n in (32, 128, 256)]
    errors = [row.error for row in result.rows]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    densities = [row.density for row in result.rows]
    assert densities == sorted(densities)
    assert densities[-1] == pytest.approx(1.0)
    assert result.dense.speedup == 1.0
    assert all(row.seconds > 0 for row in result.rows)


def test_a_name_alone_means_its_ladder():
    q, k, v = random_problem((1, 2, 2, 128, 8))
    result = compare(["sink_window", "clipped_softmax"], q, k, v, rounds=1, crossover=False)
    labels = [row.label.partition("(")[0] for row in result.rows]
    assert labels.count("sink_window") >= 3
    assert labels.count("clipped_softmax") == 1
    assert len(result.to_json()["rows"]) == len(result.rows) + 1


def test_linear_mixers_can_be_compared():
    q, k, v = random_problem((1, 2, 2, 128, 8))
    result = compare(["lightning2"], q, k, v, rounds=1, crossover=False)
    assert result.rows[0].density is None
    assert result.rows[0].error > 0


def test_on_a_grid_neighbours_along_every_axis_are_alike():
    q = random_problem((1, 1, 1, 4096, 32), grid=(8, 16, 32))[0].view(8, 16, 32, 32)
    plain = random_problem((1, 1, 1, 4096, 32))[0].view(8, 16, 32, 32)
    for axis in range(3):
        likeness = torch.cosine_similarity(q, q.roll(1, axis), dim=-1).mean()
        assert likeness == pytest.approx(2 / 3, abs=0.05)
        assert (torch.cosine_similarity(plain, plain.roll(1, axis), dim=-1).mean() > 0.5) == (axis == 2)
    assert q.std() == pytest.approx(float(plain.std()), rel=0.05)
    with pytest.raises(
        ValueError, match=re.escape("grid=(8, 8): expected one of 100 tokens, as shape=(1, 1, 1, 100, 4)")
    ):
        random_problem((1, 1, 1, 100, 4), grid=(8, 8))


def test_same_seed_same_problem():
    for a, b in zip(random_problem((1, 2, 1, 32, 4)), random_problem((1, 2, 1, 32, 4)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sink_window:window", "settings='window': expected setting=value"),
        ("sink_window:window=big", "settings='window=big': expected setting=value with a JSON value"),
        ("sink_windw", "did you mean 'sink_window'"),
    ],
)
def test_unreadable_mechanisms_are_refused(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_mechanism(text)


def test_what_cannot_run_is_refused():
    q, k, v = random_problem((1, 2, 2, 64, 8))
    with pytest.raises(ValueError, match="mechanisms='pab': of kind intervention"):
        compare(["pab"], q, k, v)
    with pytest.raises(ValueError, match="rounds=0: expected at least 1"):
        compare(["sink_window"], q, k, v, rounds=0)
    with pytest.raises(ValueError, match=r"shape=\(1, 2\): expected five sizes"):
        random_problem((1, 2))
    with pytest.raises(ValueError, match="expected kv heads 3 to divide heads 4"):
        random_problem((1, 4, 3, 8, 8))
