"""The shipped JSON schema says the same as the parser."""

from __future__ import annotations

import copy
import json
from importlib.resources import files

import jsonschema
import pytest

from saccade.plug import Recipe, RecipeError

SCHEMA = json.loads(files("saccade.plug").joinpath("recipe.schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def tree(tiny):
    model = tiny()
    return json.loads(Recipe.uniform(model, "sink_window", {"window": 8}, about={"context": 64}).to_json())


def test_what_is_written_fits_the_schema(tree):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(tree, SCHEMA)


CHANGES = {
    "newer version": lambda t: t.update(version=4),
    "unknown key": lambda t: t.update(extra=1),
    "no model": lambda t: t.pop("model"),
    "unknown model key": lambda t: t["model"].update(extra=1),
    "heads of no number": lambda t: first(t).update(heads=["a"]),
    "no heads": lambda t: first(t).update(heads=[]),
    "negative length": lambda t: first(t).update(min_tokens=-1),
    "unknown choice key": lambda t: first(t).update(extra=1),
    "settings of a list": lambda t: first(t).update(settings=[]),
    "dense settings": lambda t: first(t).update(mechanism="dense"),
    "dense engine": lambda t: first(t).update(mechanism="dense", settings={"engine": "other"}),
    "dtype": lambda t: first(t).update(dtype="int8"),
    "no choices": lambda t: next(iter(t["layers"].values())).update(prefill=[]),
    "a phase missing": lambda t: next(iter(t["layers"].values())).pop("decode"),
    "cache of a list": lambda t: cached(t, []),
    "unknown axis": lambda t: cached(t, {"forget": {}}),
    "policy without a name": lambda t: cached(t, {"keep": {"settings": {}}}),
    "policy with another key": lambda t: cached(t, {"keep": {"policy": "h2o", "heavy": 3}}),
    "bits": lambda t: cached(t, {"store": {"bits": 3}}),
    "type of numbers": lambda t: cached(t, {"store": {"dtype": "int8"}}),
    "page": lambda t: cached(t, {"store": {"page": 0}}),
    "about of a list": lambda t: t.update(about={"x": []}),
}


def first(tree):
    return next(iter(tree["layers"].values()))["prefill"][0]


def cached(tree, cache):
    next(iter(tree["layers"].values()))["cache"] = cache
    tree["version"] = 2


def test_a_cache_fits_the_schema(tree):
    for layer in tree["layers"].values():
        layer["decode"] = layer["prefill"] = [{"heads": "all", "mechanism": "dense", "settings": {}}]
    for cache in (
        {},
        {"keep": {"policy": "h2o"}, "store": {"bits": 8, "group": 4, "zero_point": True}},
        {"read": {"policy": "tidal_decode", "settings": {"tokens": 4}}, "store": {"dtype": "bfloat16", "page": 8}},
    ):
        cached(tree, cache)
        jsonschema.validate(tree, SCHEMA)
        jsonschema.validate(json.loads(Recipe.from_json(json.dumps(tree)).to_json()), SCHEMA)


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_schema_refuses_the_parser_refuses(tree, name):
    changed = copy.deepcopy(tree)
    CHANGES[name](changed)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, SCHEMA)
    with pytest.raises(RecipeError):
        Recipe.from_json(json.dumps(changed))
