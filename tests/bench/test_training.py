"""Every trainable mechanism has a task, or a reason not to."""

from __future__ import annotations

import pytest
import torch

from saccade.bench.digits import LEARNERS
from saccade.bench.recall import CASES, Outcome
from saccade.bench.training import COLUMNS, Training, bench_training
from saccade.catalog import cards
from saccade.types import Geometry, Kind, Pattern

TRAINED = [card for card in cards() if card.room == "where" and (not card.training_free or card.name in CASES)]

TRIES = 4
"""Changes of a place that are tried, of which one has to be felt elsewhere."""

NO_TASK = {
    "polyphase": "where its grid begins is no choice of what to read: it makes circular shifts shift the output",
    "vsa": "windows move and grow by gradients through interpolation; all of a window is read",
}
"""Why what reads other places for other inputs is not trained against a random choice."""


def test_only_some_of_them():
    seen = []
    results = bench_training(steps=1, only="moba$", seeds=2, progress=seen.append)
    assert [(result.name, result.task) for result in results] == [("moba", "recall"), ("vmoba", "recall")]
    assert seen == results
    assert all(len(result.outcomes) == 2 for result in results)
    assert results[0].outcomes[0] != results[0].outcomes[1]


def test_a_row_of_the_table():
    result = Training("moba", "recall", (Outcome("moba", 0.9, 0.3, 0.2), Outcome("moba", 0.7, 0.4, 0.1)), 12.3)
    assert result.margin == pytest.approx(0.45)
    assert result.to_json()["margin"] == result.margin
    (row,) = result.rows()
    assert row == ("moba", "recall", "80.0%", "35.0%", "+45.0%", "+30.0%", "15%", "12")
    assert len(row) == len(COLUMNS)
    blank = Training("nsa", "recall", (Outcome("nsa", 0.9, 0.3, None),), 1.0).rows()[0]
    assert blank[COLUMNS.index("read")] == ""


def test_tasks_do_not_overlap():
    assert not set(CASES) & set(LEARNERS)


def reads(card, seed):
    """Which places of the first input reach which of the output, bool; of a selector or mixer, those of v."""
    generator = torch.Generator().manual_seed(seed)
    mechanism = card.build()
    if card.kind is Kind.LAYER:
        first, *rest = card.target.sample_inputs(1, generator, torch.float64, "cpu")
        mechanism = mechanism.double().eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for parameter in mechanism.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        axis = 2 if first.ndim == 3 else 1  # of channels: of tokens [B, N, C], of maps [B, C, height, width]
        places = first.movedim(axis, -1).flatten(1, -2)
        change = torch.randn(TRIES, 1, 1, places.shape[2], generator=generator) * 3  # more than one, for rectifiers
        each = torch.cat([places, (places + change * torch.eye(places.shape[1])[:, :, None]).flatten(0, 1)])
        given = each.unflatten(1, first.movedim(axis, -1).shape[1:-1]).movedim(-1, axis)
        out = mechanism(given, *(x.expand(len(given), *x.shape[1:]) for x in rest))
        moved = (out[1:] - out[:1]).abs().sum(axis).flatten(1) > 1e-12
        return moved.view(TRIES, -1, moved.shape[1]).any(0)
    q, k = torch.randn(2, 1, 2, 36, 8, generator=generator)
    causal = Pattern.NONCAUSAL_SELF not in card.patterns
    geometry = Geometry(causal=causal, grid=None if causal else (6, 6))
    return mechanism(q, k, torch.eye(36).expand(1, 2, -1, -1), geometry=geometry) > 0


def test_whatever_chooses_by_content_is_trained():
    """What is made to be trained has a task, reads the same places whatever it is given, or has a reason."""
    others = [card for card in TRAINED if card.name not in {**CASES, **LEARNERS}]
    assert len(others) > 20
    choosing = {card.name for card in others if not torch.equal(reads(card, 0), reads(card, 1))}
    assert choosing == set(NO_TASK)
