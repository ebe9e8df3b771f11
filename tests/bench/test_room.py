"""A room's mechanisms on the same work."""

from __future__ import annotations

import re

import pytest
import torch

from saccade.bench import Problem, compare_room, random_problem
from saccade.bench.compare import relative_error
from saccade.bench.recall import CASES
from saccade.bench.room import COLUMNS, Oracle, random_blocks
from saccade.catalog import cards, get
from saccade.ops import block_attend, recording
from saccade.ops.dispatch import density_of
from saccade.types import Geometry, Kind, Pattern


@pytest.fixture(scope="module")
def problem():
    return Problem(*random_problem((1, 4, 2, 256, 16)), Geometry(causal=True), None)


@pytest.fixture(scope="module")
def compared(problem):
    notes = []
    result = compare_room("where", [problem, problem.head(200)], rounds=1, problem="small", progress=notes.append)
    return result, notes


def test_every_selector_of_the_room_has_rows_or_a_reason(compared):
    result, notes = compared
    shown = {row.mechanism for row in result.rows}
    assert shown | set(result.left_out) == {card.name for card in cards() if card.room == "where"}
    assert {"moba", "sink_window", "hyper_attention", "xattention"} <= shown
    assert "not for causal-self attention" in result.left_out["swin"]
    assert "of kind layer" in result.left_out["nsa"]
    assert result.left_out["prefix_sharing"] == "its card has no ladder of settings"
    assert len(notes) == 2 * len(result.rows)


def test_rows_lie_between_the_best_keys_and_nothing(compared):
    for row in compared[0].rows:
        assert 0 < row.density <= 1.01
        assert row.error <= row.worst_error
        assert row.select_seconds > 0
        assert row.oracle_error <= row.random_error + 1e-6


def test_the_table_has_a_line_per_row(compared):
    lines = compared[0].markdown().splitlines()
    assert len(lines) == 2 + len(compared[0].rows)
    assert all(line.count(" | ") == len(COLUMNS) - 1 for line in lines)
    assert len(compared[0].to_json()["rows"]) == len(compared[0].rows)


def test_only_the_rows_asked_for(problem):
    notes = []
    settings = get("sink_window").ladder(256)
    asked = rf"^sink_window\(window={settings[1]['window']},"
    result = compare_room("where", [problem], rounds=1, only=asked, progress=notes.append)
    (row,) = result.rows
    assert (row.mechanism, row.settings.split(",")[0]) == ("sink_window", f"window={settings[1]['window']}")
    assert notes[0].endswith(f"{row.density:.1%}, error {row.error:.3f}, random blocks {row.random_error:.3f}")
    with pytest.raises(ValueError, match="room='where', only='none of them': expected one with a mechanism"):
        compare_room("where", [problem], only="none of them")


@pytest.mark.parametrize("causal", [True, False])
def test_random_blocks_have_the_density_asked_for(problem, causal):
    q = problem.q.repeat(1, 1, 8, 1)
    layout = random_blocks(q, Geometry(causal=causal), 0.3)
    assert layout.density(causal=causal) == pytest.approx(0.3, rel=0.03)
    blocks = layout.block_mask()
    assert blocks.diagonal(dim1=2, dim2=3).all() == causal
    assert not torch.equal(blocks[0, 0], blocks[0, 1])


def test_few_random_blocks_are_smaller(problem):
    layout = random_blocks(problem.q.repeat(1, 1, 4, 1), Geometry(), 0.05)
    assert layout.block == (8, 8)
    assert layout.density() == pytest.approx(0.05, rel=0.05)


CAUSAL = Problem(*random_problem((1, 4, 2, 1024, 64)), Geometry(causal=True), None)
VIDEO = Problem(*random_problem((1, 4, 2, 1024, 64), grid=(4, 16, 16)), Geometry(grid=(4, 16, 16)), None)
MARGIN = {"hyper_attention": 0.99}
"""Of the error of random blocks, 0.95 where nothing is said; much of what HyperAttention reads is drawn at random."""


def dynamic_selectors():
    """(name, problem) of every selector of the room whose choice changes with the queries."""
    for card in cards():
        for problem in (CAUSAL, VIDEO):
            pattern = Pattern.CAUSAL_SELF if problem.geometry.causal else Pattern.NONCAUSAL_SELF
            if card.room == "where" and card.kind is Kind.SELECTOR and pattern in card.patterns:
                mechanism = card.build(**(card.example if card.ladder is None else card.ladder(1024)[1]))
                if looks(mechanism, problem):
                    yield pytest.param(card, problem, id=f"{card.name}-{pattern}")


def looks(mechanism, problem):
    """Whether other queries see other keys, or are said to by the pattern (stand-ins may hide it in the output)."""
    each = torch.eye(1024).expand(1, 2, -1, -1)
    try:
        chosen = [mechanism.pattern(sign * problem.q, problem.k, problem.geometry).to_dense() for sign in (1, -1)]
        seen = [mechanism(sign * problem.q, problem.k, each, geometry=problem.geometry) > 0 for sign in (1, -1)]
    except ValueError:  # windows on images refuse a video; the next test says that nothing else is lost here
        return False
    return not (torch.equal(*chosen) and torch.equal(*seen))


DYNAMIC = list(dynamic_selectors())


@pytest.mark.parametrize("name", ["hip", "infllm_v2", "llsa", "svg", "svg_ear"])
def test_what_looks_at_the_input_is_found(name):
    assert name in {parameters.values[0].name for parameters in DYNAMIC}


def test_those_that_are_made_to_be_trained_are_trained_in_the_benchmark():
    made = {parameters.values[0].name for parameters in DYNAMIC if not parameters.values[0].training_free}
    assert {"biformer", "llsa"} <= made <= set(CASES)


def test_what_does_not_is_not():
    assert not {parameters.values[0].name for parameters in DYNAMIC} & {"bigbird", "clear", "sink_window", "subsampled"}


@pytest.mark.parametrize(("card", "problem"), DYNAMIC)
def test_what_looks_at_the_input_errs_less_than_random_blocks(card, problem):
    wanted, compared = problem.dense(), 0
    for settings in card.ladder(1024):
        with recording() as records:
            out = problem.run(card.build(**settings))
        density = density_of(records) * (2 * 1024 / 1025 if problem.geometry.causal else 1)
        if not 0.04 <= density <= 0.8:
            continue
        chance = random_blocks(problem.q, problem.geometry, density)
        assert chance.density(causal=problem.geometry.causal) == pytest.approx(density, rel=0.05)
        random = relative_error(block_attend(problem.q, problem.k, problem.v, chance), wanted)
        assert relative_error(out, wanted) < MARGIN.get(card.name, 0.95) * random, settings
        compared += 1
    assert compared


def test_the_best_keys_are_those_of_the_highest_scores(problem):
    oracle = Oracle(problem)
    k, v = (x.repeat_interleave(2, 1).double() for x in (problem.k, problem.v))
    scores = (problem.q.double() @ k.transpose(2, 3)) / 4
    scores = scores.masked_fill(torch.ones(256, 256).triu(1).bool(), -torch.inf)
    kept = torch.full_like(scores, -torch.inf)
    for row in range(256):
        best = scores[:, :, row].topk(max(-(-(row + 1) // 4), 1)).indices
        kept[:, :, row].scatter_(-1, best, scores[:, :, row].gather(-1, best))
    wanted, found = scores.softmax(-1) @ v, kept.softmax(-1) @ v
    assert oracle.error(0.25) == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-3)
    assert oracle.error(1.0) < 1e-6


def test_bad_input_is_refused(problem):
    with pytest.raises(ValueError, match=re.escape("room='whre': expected one of where, ")):
        compare_room("whre", [problem])
    with pytest.raises(ValueError, match="room='cache': expected one with a mechanism that can run here"):
        compare_room("cache", [problem])
    with pytest.raises(ValueError, match="problems: expected at least one"):
        compare_room("where", [])
    with pytest.raises(ValueError, match="rounds=0: expected at least 1"):
        compare_room("where", [problem], rounds=0)
