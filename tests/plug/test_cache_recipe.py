"""The `cache` of a recipe's layers: checked, built, used, explained."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.base import Everything, compose
from saccade.mechanisms.cache.h2o import H2O
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.cache.storage import Storage
from saccade.plug import Choice, Fingerprint, LayerCache, LayerRecipe, PolicyChoice, Recipe, RecipeError, apply, explain
from saccade.plug.cache_recipe import counted, in_words, parse_cache

Build = Callable[..., Any]
MODEL = Fingerprint("LlamaForCausalLM", 2, 4, 2, 8, 32, 64, "ab" * 32)
DENSE = (Choice("all", "dense"),)
WINDOW = (Choice("all", "sink_window", {"window": 8}),)
H2O_8 = PolicyChoice("h2o", {"heavy": 4, "recent": 4})


def test_a_recipe_with_a_cache_survives_json() -> None:
    cache = LayerCache(H2O_8, None, Storage(bits=4, group=8, zero_point=True))
    plain = LayerCache(store=Storage(dtype=torch.bfloat16, page=16))
    recipe = Recipe(MODEL, {"a": LayerRecipe(DENSE, DENSE, cache), "b": LayerRecipe(DENSE, DENSE, plain)})
    tree = json.loads(recipe.to_json())
    assert tree["version"] == 2
    assert tree["layers"]["a"]["cache"]["store"] == {"bits": 4, "group": 8, "zero_point": True}
    assert tree["layers"]["b"]["cache"] == {"store": {"dtype": "bfloat16", "page": 16}}
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.has_cache
    assert json.loads(Recipe(MODEL, {"a": LayerRecipe(DENSE, DENSE)}).to_json())["version"] == 1


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ([], r"cache=\[\]: expected an object"),
        ({"evict": {}}, "cache: unknown key 'evict', expected keep, read, store"),
        (
            {"keep": {"policy": "h2", "settings": {}}},
            "keep.policy='h2': there is no such cache policy, nearest is 'h2o'",
        ),
        ({"keep": {"policy": "xxxxxx"}}, "keep.policy='xxxxxx': there is no such cache policy$"),
        ({"keep": {"policy": "sink_window"}}, "keep.policy='sink_window': there is no such cache policy"),
        ({"keep": {"policy": 3}}, "keep.policy=3: expected the name of a cache policy"),
        ({"keep": {"settings": {}}}, "keep: key 'policy' is missing"),
        ({"keep": {"policy": "h2o", "heavy": 3}}, "keep: unknown key 'heavy', expected policy, settings"),
        ({"keep": {"policy": "h2o", "settings": {"heavy": -1}}}, "keep.settings of 'h2o': heavy=-1: expected"),
        ({"keep": {"policy": "h2o", "settings": {"heavy": 0.5}}}, "keep.settings of 'h2o': heavy=0.5: expected int"),
        ({"keep": {"policy": "h2o", "settings": {"weight": 1}}}, "settings of 'h2o': .*unexpected .* 'weight'"),
        ({"keep": {"policy": "h2o", "settings": []}}, r"keep.settings=\[\]: expected an object"),
        (
            {"read": {"policy": "h2o"}},
            "read.policy='h2o': expected a policy of the axis 'read', this one decides 'keep'",
        ),
        ({"store": {"policy": "h2o"}}, "store.policy='h2o': expected a policy of the axis 'store'"),
        ({"keep": {"bits": 8}}, "keep: unknown key 'bits'"),
        ({"store": {"bits": 3}}, "store: bits=3: expected 8, 4, 2, or None"),
        ({"store": {"bits": True}}, "store: bits=True: expected"),
        ({"store": {"page": 0}}, "store: page=0: expected at least 1"),
        ({"store": {"dtype": "int8"}}, "store.dtype='int8': expected float32, bfloat16, float16 or null"),
        ({"store": {"bits": 8, "dtype": "float16"}}, "store: dtype=torch.float16: expected None together with bits=8"),
        ({"store": {"colour": 1}}, "store: unknown key 'colour', expected bits, dtype, group"),
        (
            {"keep": {"policy": "h2o"}, "read": {"policy": "tidal_decode"}},
            "cache: H2O.*needs the attention of all that is kept",
        ),
    ],
)
def test_bad_caches_give_one_clear_error(cache: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_cache(cache, "cache")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"a": LayerRecipe(DENSE, DENSE, LayerCache()), "b": LayerRecipe(DENSE, WINDOW)},
            r"layers\['b'\].decode: mechanism='sink_window', expected 'dense': layers\['a'\] has a cache",
        ),
        ({"a": LayerRecipe(WINDOW, DENSE, LayerCache(H2O_8))}, "'keep' needs all the attention weights"),
    ],
)
def test_mechanisms_that_cannot_run_beside_a_cache(layers: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(MODEL, layers).to_json()


def test_a_cache_needs_version_2() -> None:
    text = Recipe(MODEL, {"a": LayerRecipe(DENSE, DENSE, LayerCache())}).to_json()
    with pytest.raises(RecipeError, match=r"version=1: expected 2 for layers\['a'\].cache"):
        Recipe.from_json(text.replace('"version": 2', '"version": 1'))


def test_each_layer_has_its_own_policy(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    base = Recipe.uniform(model, "dense")
    first, second = base.layers
    recipe = Recipe(base.model, {
        first: LayerRecipe(DENSE, DENSE, LayerCache(keep=H2O_8)),
        second: LayerRecipe(DENSE, DENSE),
    })  # fmt: skip
    with apply(model, recipe), torch.no_grad():
        assert explain(model).rows[0].cache == "keep h2o(heavy=4, recent=4)"
        assert "keep h2o(heavy=4, recent=4)" in str(explain(model))
        cache = recipe.make_cache(model)
        model.generate(ids, past_key_values=cache, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        told = explain(model)
        assert "not in use" not in str(told)
        model(ids, use_cache=False)
        assert "not in use: pass recipe.make_cache(model)" in str(explain(model))
    assert [len(layer.store) for layer in cache.layers] == [8, 45]
    decode = [row for row in told.rows if row.phase == "decode"]
    assert [(row.kept, row.cache_bytes) for row in decode] == [
        (8.0, cache.layers[0].store.nbytes),
        (45.0, cache.layers[1].store.nbytes),
    ]
    assert [row.cache for row in decode] == ["keep h2o(heavy=4, recent=4)", "everything"]


def test_a_recipe_without_caches_and_with_one_for_all(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    plain = Recipe.uniform(model, "dense")
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert not plain.has_cache
    with pytest.raises(ValueError, match="no recipe is applied"):
        plain.make_cache(model)
    with apply(model, plain):
        out = model.generate(
            ids, past_key_values=plain.make_cache(model), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )  # fmt: skip
    assert torch.equal(out, expected)
    recipe = Recipe.uniform(model, "dense", cache=LayerCache(store=Storage(bits=8)))
    with apply(model, recipe):
        assert [layer.policy for layer in recipe.make_cache(model).layers] == [compose(store=Storage(bits=8))] * 2


def test_a_bad_policy_changes_nothing(tiny: Build) -> None:
    model = tiny()
    bad = Recipe.uniform(model, "dense", cache=LayerCache(keep=PolicyChoice("h20")))
    with pytest.raises(RecipeError, match="nearest is 'h2o'"):
        apply(model, bad)
    assert not explain(model).applied


def test_policies_in_words() -> None:
    assert in_words(Everything()) == in_words(compose()) == "everything"
    assert in_words(Everything(Storage(bits=8))) == "bits=8"
    mixed = compose(keep=SinkRecent(2, 9), store=Storage(dtype=torch.bfloat16))
    assert in_words(mixed) == "keep sink_recent(sinks=2, recent=9), store dtype=bfloat16"
    assert in_words(H2O(3, 4)) == "h2o(heavy=3, recent=4)"


def test_what_the_layers_have_is_counted() -> None:
    assert counted(["a", "a"]) == "a"
    assert counted(["a", "b", "a"]) == "a in 2 layers; b in 1"
    assert counted("abcdeaab") == "a in 3 layers; b in 2; c in 1; 2 more in 2"
