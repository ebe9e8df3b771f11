"""A room's mechanisms on the same work."""

from __future__ import annotations

import re

import pytest
import torch

from saccade.bench import Problem, compare_room, random_problem
from saccade.bench.room import COLUMNS, Oracle, random_blocks
from saccade.types import Geometry


@pytest.fixture(scope="module")
def problem():
    return Problem(*random_problem((1, 4, 2, 256, 16)), Geometry(causal=True), None)


@pytest.fixture(scope="module")
def compared(problem):
    notes = []
    result = compare_room("where", [problem, problem.head(200)], rounds=1, problem="small", progress=notes.append)
    return result, notes


def test_every_selector_of_the_room_has_rows_or_a_reason(compared):
    from saccade.catalog import cards

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


@pytest.mark.parametrize("causal", [True, False])
def test_random_blocks_have_the_density_asked_for(problem, causal):
    q = problem.q.repeat(1, 1, 8, 1)
    layout = random_blocks(q, Geometry(causal=causal), 0.3)
    assert layout.density(causal=causal) == pytest.approx(0.3, abs=0.03)
    blocks = layout.block_mask()
    assert blocks.diagonal(dim1=2, dim2=3).all()
    assert not torch.equal(blocks[0, 0], blocks[0, 1])


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
