"""Trainable selectors train: on recall each beats the same model with as many random blocks, by the margin said."""

from __future__ import annotations

import pytest
import torch

from saccade.bench.recall import CASES, LABELS, Recaller, recall, sequences

MARGIN = 0.25
"""After 80 steps; NSA, whose compressed branch reads all blocks anyway, has half of it to gain."""

QUICK = ("biformer", "llsa", "moba", "routing_attention")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in sorted(CASES)]
)
def test_its_choice_beats_random_blocks(name):
    outcome = recall(name, steps=80, batch=16)
    assert outcome.margin > (MARGIN / 2 if name == "nsa" else MARGIN), outcome
    assert outcome.drawn > 1 / LABELS - 0.05  # the random blocks were not worse than a guess
    assert outcome.density is None or outcome.density <= 0.25


def test_random_clusters_are_as_large():
    model = Recaller("routing_attention", drawn=True, seed=0)
    taken = []
    members = model.mechanism._members
    model.mechanism._members = lambda x: taken.append(members(x)) or taken[-1]
    names = torch.randn(8, 24)
    for _ in range(2):
        model(sequences(names, 3, 4, torch.Generator().manual_seed(0))[0])
    assert taken[0].shape == taken[1].shape == (3, 1, 8, 8)
    assert (taken[0].diff(dim=-1) > 0).all()  # each token once, in order
    assert not torch.equal(*taken)


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


def test_refuses_what_it_has_no_settings_for():
    with pytest.raises(ValueError, match="name='swin': expected one of"):
        recall("swin")
