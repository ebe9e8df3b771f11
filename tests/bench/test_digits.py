"""Trained layers choose well: on digits each beats the same model with as much that is random, by the margin said."""

from __future__ import annotations

import pytest
import torch

from saccade.bench.digits import BATCH, GRID, LEARNERS, PARTS, SLOTS, learn_digits
from saccade.models.digits import Digits, load_digits

MARGIN = {"high_resolution": 0.1, "histogram": 0.05, "select_and_pack": 0.4, "sparsifiner": 0.15}
"""Of the scores after 100 steps; after 400 they are several times as large."""

QUICK = ("select_and_pack",)


@pytest.fixture(scope="module", autouse=True)
def sklearn():
    return pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in sorted(LEARNERS)]
)
def test_its_choice_beats_a_random_one(name):
    outcome = learn_digits(name, steps=100)
    assert outcome.margin > MARGIN[name], outcome
    assert outcome.density is None or outcome.density < 0.15


def test_the_same_run_twice():
    assert learn_digits("select_and_pack", steps=2) == learn_digits("select_and_pack", steps=2)


def models(name):
    built = []
    for drawn in (False, True):
        torch.manual_seed(0)
        built.append(LEARNERS[name](drawn=drawn, seed=0).eval())
    return built


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_the_random_choice_is_all_that_differs(name):
    chosen, drawn = models(name)
    assert all(torch.equal(a, b) for a, b in zip(chosen.parameters(), drawn.parameters(), strict=True))
    digits = load_digits()[1]
    losses = [m.loss(digits, torch.Generator().manual_seed(1), 1.0) for m in (chosen, chosen, drawn, drawn)]
    assert losses[0] == losses[1]
    assert losses[2] != losses[3]  # another draw each time
    losses[2].backward()
    assert all(torch.isfinite(p.grad).all() for p in drawn.layer.parameters() if p.grad is not None)


def test_as_many_patches_are_selected():
    chosen, drawn = models("select_and_pack")
    kept = torch.rand(5, GRID**2) < 0.3
    counts = [sum(m.layer._slots(kept)[0] < m.layer._slots(kept)[1] * 16) for m in (chosen, drawn)]
    assert counts[0] == counts[1] == kept.sum()
    assert torch.equal(drawn.shuffled(kept)[0].sum(1), kept.sum(1))


def test_as_many_keys_are_read():
    for model in models("sparsifiner"):
        q, k = torch.randn(2, 2, 2, GRID**2 + 1, 16)
        lists = model.layer.connectivity(q, k)
        assert lists.shape == (2, 2, GRID**2 + 1, PARTS**2)
        assert (lists.sort(-1).values.diff(dim=-1) > 0).all()


def test_sparsifiner_is_dense_in_the_first_half():
    model, seen = LEARNERS["sparsifiner"](drawn=False, seed=0), []
    connectivity = model.layer.connectivity
    model.layer.connectivity = lambda q, k: seen.append(connectivity(q, k)) or seen[-1]
    for done in (0.4, 0.5):
        model.loss(load_digits()[0], torch.Generator(), done)
    assert [lists.shape[-1] for lists in seen] == [GRID**2 + 1, PARTS**2]


def test_as_many_fine_patches_are_chosen():
    chosen, drawn = models("high_resolution")
    seen = torch.rand(BATCH, 1, SLOTS**2)
    counts = [model.layer.chosen(seen).sum(2) for model in (chosen, drawn)]
    assert torch.equal(*counts)
    assert counts[0].max() < GRID**2


def test_random_orders_are_orders():
    _, drawn = models("histogram")
    x = torch.randn(2, 3, 4, 5)
    for dim in (2, 3):
        values, order = drawn.layer._sort(x, dim)
        assert torch.equal(values, x.gather(dim, order))
        assert torch.equal(values.sort(dim).values, x.sort(dim).values)


def test_a_perfect_image_scores_1():
    model = LEARNERS["histogram"](drawn=False, seed=0)
    images = torch.rand(6, 8, 8)
    hazed, clear = Digits(images, torch.arange(6)).hazed(1000, 16, torch.Generator().manual_seed(0))
    model.forward = lambda given: clear if torch.equal(given, hazed) else given
    assert model.score(Digits(images, torch.arange(6)), torch.Generator().manual_seed(0)) == 1.0


def test_refuses_what_it_has_no_model_for():
    with pytest.raises(ValueError, match=r"name='swin': expected one of \['high_resolution', 'histogram',"):
        learn_digits("swin")
