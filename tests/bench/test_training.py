"""Trainable selectors train: on recall each beats the same model with as many random blocks, by the margin said."""

from __future__ import annotations

import pytest
import torch

from saccade.bench.training import CASES, LABELS, bench_training, recall, sequences

MARGIN = 0.25
"""After 80 steps; NSA, whose compressed branch reads all blocks anyway, has half of it to gain."""

QUICK = ("biformer", "llsa", "moba")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in sorted(CASES)]
)
def test_its_choice_beats_random_blocks(name):
    outcome = recall(name, steps=80, batch=16)
    assert outcome.margin > (MARGIN / 2 if name == "nsa" else MARGIN), outcome
    assert outcome.drawn > 1 / LABELS - 0.05  # the random blocks were not worse than a guess
    assert outcome.density is None or outcome.density <= 0.25


def test_the_same_run_twice():
    assert recall("llsa", steps=2, pairs=8, batch=4) == recall("llsa", steps=2, pairs=8, batch=4)


def test_askers_of_a_block_ask_for_names_of_one_block():
    names = torch.randn(8, 24)
    x, labels = sequences(names, 5, 4, torch.Generator().manual_seed(0))
    for item, wanted in zip(x, labels, strict=True):
        told, asked = item[:8], item[8:]
        place = [int((told[:, :24] == row[:24]).all(1).nonzero()) for row in asked]
        assert sorted(place) == list(range(8))
        assert [len({p // 4 for p in place[start : start + 4]}) for start in (0, 4)] == [1, 1]
        assert told[place, 24:-1].argmax(1).tolist() == wanted.tolist()
        assert asked[:, 24:-1].any() == told[:, -1].any() == torch.tensor(0.0).bool()


def test_only_some_of_them():
    seen = []
    outcomes = bench_training(steps=1, only="moba$", progress=seen.append)
    assert [outcome.name for outcome in outcomes] == ["moba", "vmoba"]
    assert seen == outcomes
    row = outcomes[0].rows()[0]
    assert row[0] == "moba"
    assert row[3].endswith("%")
    assert outcomes[0].to_json()["margin"] == outcomes[0].margin


def test_refuses_what_it_has_no_settings_for():
    with pytest.raises(ValueError, match="name='swin': expected one of"):
        recall("swin")
