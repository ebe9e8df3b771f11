"""Caches within a part of the bytes that hold end to end."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers")

import torch

from saccade.mechanisms.cache.storage import Storage
from saccade.models.passkey import PasskeyLikelihood
from saccade.plug import Choice, LayerCache, PolicyChoice, Recipe
from saccade.tune.cache_score import CacheScore
from saccade.tune.cache_search import (
    CacheOptions,
    CacheSearch,
    least_damage,
    make_options,
    sparse_layers,
    too_slow,
    trial_rows,
    with_caches,
)
from saccade.tune.caches import CacheCandidate
from saccade.tune.confirm import MARGIN, Retrieval

EXACT, CODES = LayerCache(), LayerCache(store=Storage(bits=8))
RECENT = LayerCache(keep=PolicyChoice("sink_recent", {"recent": 8}))
NEEDY = LayerCache(keep=PolicyChoice("h2o", {"heavy": 8, "recent": 8}))
CANDIDATES = [CacheCandidate(cache) for cache in (EXACT, RECENT, NEEDY, CODES)]


def score(share, damage, seconds=0.5, dense_seconds=1.0, refused=""):
    return CacheScore(share, damage, seconds, dense_seconds, refused)


def ladder_options(layers=4):
    """Shares 1, 1/2, 1/4, 1/8; damage grows fourfold a step and from layer to layer."""
    shares = torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float64).repeat(layers, 1)
    steps = torch.tensor([0.0, 1.0, 4.0, 16.0], dtype=torch.float64)
    weight = torch.linspace(1.0, 3.0, layers, dtype=torch.float64)[:, None]
    return CacheOptions([EXACT, RECENT, NEEDY, CODES], shares, 1e-3 * steps * weight)


def retrieval(rise, *, found=True):
    mine = PasskeyLikelihood(-0.5 if found else -3.0, found, 2.0 + math.log1p(rise))
    return Retrieval([64], [mine], [PasskeyLikelihood(-0.5, found=True, nll=2.0)])


def shares_of(options, caches):
    return sum(float(options.shares[0, options.caches.index(cache)]) for cache in caches) / len(caches)


def test_options_multiply_shares_and_add_damages():
    rows = {"a": [score(1.1, 0.0), score(0.5, 0.02), score(0.25, 0.01), score(0.3, 0.001)]}
    options = make_options(CANDIDATES, rows, set())
    places = {(cache.keep and cache.keep.policy, bool(cache.store)): n for n, cache in enumerate(options.caches)}
    assert len(places) == len(options.caches) == 6
    both = places["sink_recent", True]
    assert float(options.shares[0, both]) == pytest.approx(0.15)
    assert float(options.damage[0, both]) == pytest.approx(0.021)
    assert float(options.shares[0, places[None, False]]) == 1.1


def test_what_needs_all_weights_is_ruled_out_beside_a_sparse_prefill():
    row = [score(1.0, 0.0), score(0.5, 0.02), score(0.5, 0.01), score(0.9, 0.0)]
    options = make_options(CANDIDATES, {"sparse": row, "dense": row}, {"sparse"})
    needy = [number for number, cache in enumerate(options.caches) if cache.keep and cache.keep.policy == "h2o"]
    assert options.damage[0, needy].isinf().all()
    assert options.damage[1, needy].isfinite().all()
    chosen = least_damage(options, 0.5).chosen.tolist()
    assert [options.caches[number].keep.policy for number in chosen] == ["sink_recent", "h2o"]


def test_refused_and_slow_caches_are_ruled_out():
    row = [score(1.0, 0.0), score(0.5, 0.0, seconds=1.2), score(0.5, 0.0), score(0.5, 0.1, refused="group=32")]
    assert too_slow([row]).tolist() == [False, True, False, False]
    assert too_slow([[score(1.0, 0.0, seconds=2.0), score(0.5, 0.0, seconds=2.1)]]).tolist() == [False, False]
    options = make_options(CANDIDATES, {"a": row}, set())
    allowed = [cache for cache, damage in zip(options.caches, options.damage[0], strict=True) if damage.isfinite()]
    assert allowed == [EXACT, NEEDY]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3, 0.125])
def test_least_damage_is_within_the_share_and_beats_its_neighbours(share):
    options = ladder_options()
    found = least_damage(options, share)
    assert found.share <= share
    every = torch.cartesian_prod(*[torch.arange(4)] * 4)
    layer = torch.arange(4)
    fitting = options.shares[layer, every].mean(1) <= share
    best = options.damage[layer, every].sum(1)[fitting].min()
    assert found.damage <= 2 * float(best) + 1e-12  # a price finds corners of the frontier, not all that lies between


def test_the_smallest_there_is_where_nothing_is_small_enough():
    found = least_damage(ladder_options(), 0.01)
    assert found.chosen.tolist() == [3] * 4


def test_the_wanted_share_is_enough():
    options = ladder_options()
    search = CacheSearch(options, 0.01, lambda caches: (retrieval(0.0), shares_of(options, caches)))
    best = search.run(0.5, 5, lambda note: None)
    assert len(search.trials) == 1
    assert search.kept is search.trials[0]
    assert shares_of(options, best) <= 0.5


def test_quality_lost_makes_it_back_off():
    options, notes = ladder_options(), []

    def measure(caches):
        share = shares_of(options, caches)
        return retrieval(0.02 * (1 - share)), share

    search = CacheSearch(options, 0.01, measure)
    best = search.run(0.2, 5, notes.append)
    assert 0.02 * (1 - shares_of(options, best)) <= MARGIN * 0.01
    assert shares_of(options, best) < 1
    assert not search.trials[0].holds
    assert len(notes) == len(search.trials)
    assert "of the bytes, perplexity +" in notes[0]
    rows = trial_rows(search.trials, search.kept)
    assert [row["kept"] for row in rows].count(True) == 1


def test_lost_pass_keys_do_not_hold_and_nothing_may_hold():
    search = CacheSearch(ladder_options(), 0.5, lambda caches: (retrieval(0.0, found=False), None))
    assert search.run(0.3, 3, lambda note: None) is None
    assert search.trials
    assert not any(trial.holds for trial in search.trials)
    assert search.kept is None


def test_more_bytes_than_predicted_are_aimed_under():
    options = ladder_options()
    search = CacheSearch(options, 0.5, lambda caches: (retrieval(0.0), shares_of(options, caches) + 0.1))
    best = search.run(0.5, 5, lambda note: None)
    assert shares_of(options, best) + 0.1 <= 0.5
    assert [trial.holds for trial in search.trials] == [True] * len(search.trials)
    assert search.kept.share <= 0.5 < search.trials[0].share


def test_caches_go_into_a_recipe_layer_by_layer(byte_model):
    recipe = Recipe.uniform(byte_model[0], "dense")
    names = list(recipe.layers)
    both = with_caches(recipe, [EXACT, CODES])
    assert [both.layers[name].cache for name in names] == [EXACT, CODES]
    assert sparse_layers(both) == set()
    sparse = Recipe.uniform(byte_model[0], "sink_window", {"window": 8}, decode=False)
    assert sparse_layers(sparse) == set(names)
    assert sparse.layers[names[0]].decode == (Choice("all", "dense"),)
