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


def likeness(x, distance, axis):
    """Correlation of `[heads, *axes, D]` with itself moved along an axis."""
    return float((x * x.roll(distance, axis)).mean() / x.square().mean())


def test_neighbours_are_alike_as_in_a_language_model():
    for x in random_problem((1, 2, 2, 4096, 64)):
        found = [likeness(x[0], distance, 1) for distance in (1, 4, 16, 64)]
        assert found == pytest.approx([0.7, 0.5, 0.3, 0.1], abs=0.1)


def test_on_a_grid_neighbours_along_every_axis_are_alike():
    q, k, v = random_problem((1, 2, 2, 4096, 32), grid=(8, 16, 32))
    for x in (q, k, v):
        for axis in (1, 2, 3):
            assert likeness(x[0].view(2, 8, 16, 32, 32), 1, axis) > 0.45
    assert q.std() == pytest.approx(3**0.5, rel=0.1)
    assert v.std() == pytest.approx(1.0, rel=0.1)


def test_queries_like_keys_near_them_heads_of_a_video_in_turns():
    q, k, _ = random_problem((1, 4, 2, 4096, 64), grid=(16, 16, 16))
    scores = (q @ k.repeat_interleave(2, 1).mT / 8)[0].view(4, 16, 256, 16, 256)
    frames = scores.diagonal(dim1=1, dim2=3).mean((1, 2, 3))
    places = scores.diagonal(dim1=2, dim2=4).mean((1, 2, 3))
    assert frames.tolist() == pytest.approx([8, 8, 0, 0], abs=3)
    assert places.tolist() == pytest.approx([0, 0, 8, 8], abs=3)
    q, k, _ = random_problem((1, 4, 2, 4096, 64))
    assert (q * k.repeat_interleave(2, 1)).sum(-1).mean() / 8 == pytest.approx(8, abs=1)


def test_a_grid_of_other_tokens_is_refused():
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
