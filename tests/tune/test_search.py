"""The search over assignments, against brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from saccade.tune.candidates import DENSE, Candidate
from saccade.tune.search import LARGEST_GROUPS, Choices, assign, evaluate, frontier, within

pytestmark = pytest.mark.quick


def make_choices(layers=2, heads=2, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    seconds = torch.rand(layers, heads, count, generator=generator, dtype=torch.float64)
    seconds[..., 0] = 0.9
    damage = torch.rand(layers, heads, count, generator=generator, dtype=torch.float64)
    damage[..., 0] = 0
    candidates = [Candidate(DENSE)] + [Candidate("sink_window", {"window": n}) for n in range(1, count)]
    return Choices(candidates, seconds, damage)


def total(choices, chosen, price):
    found = evaluate(choices, chosen)
    return found.seconds + price * found.damage


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("price", [0.0, 0.3, 2.0, 100.0])
def test_assign_is_the_cheapest_of_all(seed, price):
    choices = make_choices(layers=1, heads=3, seed=seed)
    found = total(choices, assign(choices, price).chosen, price)
    allowed = [[c for c in range(4) if c == 0 or head[c] < head[0]] for head in choices.seconds[0]]
    every = [chosen for chosen in product(*allowed) if len(set(chosen)) <= LARGEST_GROUPS]
    best = min(total(choices, torch.tensor([chosen]), price) for chosen in every)
    assert found == pytest.approx(best)


def test_a_slower_candidate_is_never_taken_even_if_harmless():
    choices = make_choices()
    seconds = choices.seconds.clone()
    seconds[..., 1:] = 1.0
    slow = Choices(choices.candidates, seconds, torch.zeros_like(choices.damage))
    assert assign(slow, 0.0).chosen.eq(0).all()


def test_price_moves_from_fast_to_dense():
    choices = make_choices(layers=3, heads=4)
    points = frontier(choices)
    assert [p.damage for p in points] == sorted((p.damage for p in points), reverse=True)
    assert points[-1].chosen.eq(0).all()
    assert points[0].seconds == min(p.seconds for p in points)


@pytest.mark.parametrize("allowed", [0.0, 0.2, 1.0, 1e9])
def test_within_keeps_the_damage(allowed):
    choices = make_choices(layers=3, heads=4)
    found = within(choices, allowed)
    assert found.damage <= allowed
    assert found.seconds <= float(choices.seconds[..., 0].sum()) + 1e-9


def test_choices_refuse_what_does_not_fit():
    good = make_choices()
    with pytest.raises(ValueError, match=r"seconds of shape \(2, 2, 3\): expected \(2, 2, 4\)"):
        Choices(good.candidates, good.seconds[..., :3], good.damage)
    with pytest.raises(ValueError, match=r"candidates\[0\]=sink_window\(window=1\): expected dense"):
        Choices(good.candidates[1:], good.seconds[..., 1:], good.damage[..., 1:])
    with pytest.raises(ValueError, match="price=-1.0: expected at least 0"):
        assign(good, -1.0)
