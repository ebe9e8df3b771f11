"""`saccade.plug.recipe`: round trips, and one clear error for whatever else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.mechanisms.cache.storage import Storage
from saccade.plug import Choice, Fingerprint, LayerCache, LayerRecipe, PolicyChoice, Recipe, RecipeError
from saccade.plug.strict_json import MAX_BYTES

pytestmark = pytest.mark.quick

MODEL = Fingerprint("LlamaForCausalLM", 2, 4, 2, 8, 32, 64, "ab" * 32)
DENSE = (Choice("all", "dense"),)
RECIPE = Recipe(
    MODEL,
    {
        "model.layers.0.self_attn": LayerRecipe(
            (Choice((0, 2), "sink_window", {"window": 8, "grid": (3, (4, 5))}), Choice((1, 3), "dense")), DENSE
        ),
        "model.layers.1.self_attn": LayerRecipe(DENSE, DENSE),
    },
    {"context": 8192, "rise": 0.5, "note": "ok", "quick": True, "none": None},
)

CACHED = Recipe(
    MODEL,
    {
        "a": LayerRecipe(
            DENSE, DENSE, LayerCache(keep=PolicyChoice("h2o", {"heavy": 8}), store=Storage(bits=8, group=4))
        ),
        "b": LayerRecipe(DENSE, DENSE, LayerCache(read=PolicyChoice("tidal_decode"), store=Storage(page=16))),
    },
)


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(RECIPE.to_json()) | changes)


def with_choice(phase: str = "decode", **changes: Any) -> str:
    tree = json.loads(RECIPE.to_json())
    tree["layers"]["model.layers.1.self_attn"][phase][0] |= changes
    return json.dumps(tree)


def test_round_trip_through_text_and_file(tmp_path: Path) -> None:
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE
    assert Recipe.from_json(RECIPE.to_json().encode()) == RECIPE
    RECIPE.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == RECIPE
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_the_dtype_of_a_choice_makes_it_version_3() -> None:
    narrow = (Choice((0, 2), "sink_window", {"window": 8}, dtype="bfloat16"), Choice((1, 3), "dense"))
    recipe = Recipe(MODEL, {"a": LayerRecipe(narrow, DENSE)})
    tree = json.loads(recipe.to_json())
    assert tree["version"] == 3
    assert [choice.get("dtype") for choice in tree["layers"]["a"]["prefill"]] == ["bfloat16", None]
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_lists_in_settings_become_tuples() -> None:
    assert Choice([0, 1], "x", {"grid": [1, [2]]}) == Choice((0, 1), "x", {"grid": (1, (2,))})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.to_json()[: len(RECIPE.to_json()) // 2], "recipe is not complete JSON"),
        ("", "recipe is not complete JSON"),
        (b"\xff\xfe\x00", "recipe is not complete JSON"),
        ("[]", r"recipe=\[\]: expected an object"),
        ("[" * 100_000, "nested deeper than 12 levels"),
        ('{"version": ' + "[" * 20 + "]" * 20 + "}", "nested deeper than 12 levels"),
        ('{"version": 1, "version": 1}', "key 'version' appears twice"),
        (changed(version=4), "version=4: this Saccade reads up to 3; a newer one wrote it"),
        (changed(version=0), "version=0: expected 1 to 3"),
        (changed(version=True), "version=True: expected 1 to 3"),
        (changed(version="1"), "version='1': expected 1 to 3"),
        (changed(colour=1), "recipe: unknown key 'colour', expected version, model, layers, about"),
        (changed(about={"a": [1]}), r"about\['a'\]=\[1\]: expected a string, number, boolean or null"),
        (changed(model={"architecture": "x"}), "model: key 'layers' is missing"),
        (changed(model=json.loads(RECIPE.to_json())["model"] | {"heads": 0}), "model.heads=0: expected a count"),
        (changed(model=json.loads(RECIPE.to_json())["model"] | {"weights": 3}), "model.weights=3: expected a string"),
        (changed(layers={"a": {"prefill": []}}), r"layers\['a'\]: key 'decode' is missing"),
        (changed(layers={"a": {"prefill": [], "decode": []}}), r"prefill=\[\]: expected a list of at least one"),
        (with_choice(colour=1), r"decode\[0\]: unknown key 'colour', expected heads, mechanism, settings"),
        (with_choice(heads=[0, 1]), r"decode: heads \[0, 1\], expected each of 0 to 3 exactly once"),
        (with_choice(heads=[0, 1, 2, 4]), r"heads \[0, 1, 2, 4\], expected each of 0 to 3"),
        (with_choice(heads=[1, 0]), r'heads=\[1, 0\]: expected "all" or ascending head numbers'),
        (with_choice(heads=[False]), r"heads=\[False\]: expected"),
        (with_choice(heads=[-1]), r"heads=\[-1\]: expected"),
        (with_choice(mechanism=""), "mechanism='': expected the name of a mechanism or 'dense'"),
        (
            with_choice(settings={"window": 1}),
            r"settings={'window': 1}: dense attention has one, 'engine': 'model' or 'saccade'",
        ),
        (with_choice(settings={"engine": "x"}), r"settings={'engine': 'x'}: dense attention has one, 'engine'"),
        (with_choice(settings=None), "settings=None: expected an object"),
        (
            with_choice(dtype="bfloat16", settings={"engine": "saccade"}),
            r"decode\[0\].dtype='bfloat16': expected none, a cache says what it stores keys and values in",
        ),
        (with_choice("prefill", dtype="bfloat16"), r"prefill\[0\].dtype='bfloat16': expected settings {'engine'"),
        (with_choice("prefill", dtype="float32"), "dtype='float32': expected one of bfloat16, float16, or none"),
        (
            with_choice("prefill", dtype="bfloat16", settings={"engine": "saccade"}),
            "version=1: expected 3 for the dtype in layers",
        ),
        (changed(about={"x": 1}).replace("1}", "NaN}"), "recipe holds NaN: expected finite numbers"),
        (changed(about={"x": 1}).replace('"x": 1', '"x": 1e999'), "recipe holds 1e999: expected finite numbers"),
        (changed(about={"x": 1}).replace('"x": 1', '"x": ' + "9" * 5000), "recipe is not complete JSON"),
        (" " * (MAX_BYTES + 1), "expected a smaller one"),
    ],
)
def test_bad_recipes_give_one_clear_error(text: str | bytes, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json(text)


def test_two_choices_of_which_one_is_for_all_heads() -> None:
    layer = LayerRecipe((Choice("all", "dense"), Choice((0,), "dense")), DENSE)
    with pytest.raises(RecipeError, match="2 choices and one for all heads"):
        Recipe(MODEL, {"a": layer}).to_json()


def test_settings_that_json_cannot_hold_are_refused() -> None:
    layer = LayerRecipe((Choice("all", "x", {"f": float("nan")}),), DENSE)
    with pytest.raises(RecipeError, match="cannot be written as JSON"):
        Recipe(MODEL, {"a": layer}).to_json()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing.json'.*: cannot be read: No such file"):
        Recipe.load(tmp_path / "missing.json")
    (tmp_path / "cut.json").write_text(RECIPE.to_json()[:100])
    with pytest.raises(RecipeError, match=r"cut.json: recipe is not complete JSON"):
        Recipe.load(tmp_path / "cut.json")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([RECIPE, CACHED]), st.integers(0, 2000), st.binary(max_size=6), st.integers(0, 12))
def test_mutated_bytes_give_a_recipe_or_a_recipe_error(base: Recipe, place: int, junk: bytes, length: int) -> None:
    data = base.to_json().encode()
    mutated = data[:place] + junk + data[place + length :]
    try:
        recipe = Recipe.from_json(mutated)
    except RecipeError:
        return
    assert Recipe.from_json(recipe.to_json()) == recipe


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(base=st.sampled_from([RECIPE, CACHED]), value=JSON, path=st.lists(st.integers(0, 7), min_size=1, max_size=6))
def test_any_value_in_any_place_gives_a_recipe_or_a_recipe_error(base: Recipe, value: Any, path: list[int]) -> None:
    tree = node = json.loads(base.to_json())
    for step in path:
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not places:
            break
        place = places[step % len(places)]
        if step == path[-1] or not isinstance(node[place], dict | list):
            node[place] = value
            break
        node = node[place]
    try:
        recipe = Recipe.from_json(json.dumps(tree))
    except RecipeError:
        return
    assert recipe.to_json()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64))
def test_random_bytes_give_a_recipe_error(data: bytes) -> None:
    with pytest.raises(RecipeError):
        Recipe.from_json(data)
