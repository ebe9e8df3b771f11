"""Recipes: which mechanism each layer of one model uses, as JSON that is checked to the last key.

```json
{"version": 1,
 "model": {"architecture": "LlamaForCausalLM", "layers": 30, "heads": 9, ..., "weights": "<sha-256>"},
 "layers": {"model.layers.0.self_attn": {
   "prefill": [{"heads": "all", "mechanism": "sink_window", "settings": {"window": 1024}}],
   "decode": [{"heads": [0, 1, 2], "mechanism": "dense", "settings": {}}, ...]}},
 "about": {"context": 8192}}
```

Layers are named exactly as `model.named_modules()` names their attention modules; a layer that is not named stays as it
is. In each phase (prefill: more than one query; decode: one) every head is chosen for exactly once. `about` holds notes
and is not interpreted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from saccade.catalog import get
from saccade.plug.fingerprint import Fingerprint, fingerprint
from saccade.plug.layers import attention_layers
from saccade.plug.strict_json import MAX_BYTES, RecipeError, expect_keys, expect_object, frozen, parse, shown

VERSION = 1
DENSE = "dense"
"""Name of the choice that computes every pair: as the model had it, or on Saccade's engine (see `ENGINES`)."""

ENGINES = ("model", "saccade")
"""What may run dense attention, its one setting `engine`. The model's own is the default and equal to the bit."""

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Choice:
    """What some heads of a layer use.

    Args:
        heads: "all", or indices of query heads, ascending.
        mechanism: Registry name, or "dense".
        settings: Hyperparameters of the mechanism; what is left out has its default. Lists are held as tuples.
        min_tokens: Calls with fewer keys run dense, which is faster below the crossover length.
    """

    heads: Literal["all"] | tuple[int, ...]
    mechanism: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    min_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", frozen(self.heads))
        object.__setattr__(self, "settings", frozen(dict(self.settings)))


@dataclass(frozen=True)
class LayerRecipe:
    """What a layer uses: in each phase, choices that cover every head exactly once."""

    prefill: tuple[Choice, ...]
    decode: tuple[Choice, ...]


@dataclass(frozen=True)
class Recipe:
    """Which mechanism each layer of one model uses.

    Args:
        model: Fingerprint of the model it is for.
        layers: By exact module name.
        about: Notes: strings, numbers, booleans or None.
    """

    model: Fingerprint
    layers: Mapping[str, LayerRecipe]
    about: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    @classmethod
    def uniform(
        cls,
        model: Any,
        mechanism: str,
        settings: Mapping[str, Any] | None = None,
        *,
        decode: bool = True,
        about: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> Recipe:
        """The recipe that uses one mechanism in every layer and head of the (text) model.

        Args:
            model: A transformers model.
            mechanism: Registry name, or "dense".
            settings: Its hyperparameters.
            decode: Use it for single queries too; else, and if it is for prefill only, these stay dense.
            about: Notes.

        Returns:
            The recipe, for this model only.
        """
        chosen = (Choice("all", mechanism, settings if settings is not None else {}),)
        once = mechanism != DENSE and bool(get(mechanism).prefill_only)
        layer = LayerRecipe(chosen, chosen if decode and not once else (Choice("all", DENSE),))
        text = model.config.get_text_config()
        names = [name for name, module in attention_layers(model).items() if module.config is text]
        return cls(fingerprint(model), dict.fromkeys(names, layer), {} if about is None else about)

    def to_json(self) -> str:
        """The recipe as JSON; `from_json` gives back an equal one.

        Returns:
            The text.

        Raises:
            RecipeError: If the recipe is not well formed.
        """
        tree = {
            "version": VERSION,
            "model": asdict(self.model),
            "layers": {name: {phase: _dump(getattr(layer, phase)) for phase in PHASES}
                       for name, layer in self.layers.items()},
            "about": dict(self.about),
        }  # fmt: skip
        try:
            text = json.dumps(tree, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RecipeError(f"recipe: cannot be written as JSON: {error}") from error
        self.from_json(text)
        return text

    @classmethod
    def from_json(cls, text: str | bytes) -> Recipe:
        """Read and check a recipe.

        Args:
            text: JSON, as text or UTF-8 bytes.

        Returns:
            The recipe.

        Raises:
            RecipeError: Saying where the text is wrong and what is expected there.
        """
        tree = expect_object(parse(text), "recipe")
        version = tree.get("version")
        if type(version) is not int or version < 1:
            raise RecipeError(f"version={shown(version)}: expected {VERSION}")
        if version > VERSION:
            raise RecipeError(f"version={shown(version)}: this Saccade reads up to {VERSION}; a newer one wrote it")
        expect_keys(tree, "recipe", ("version", "model", "layers"), optional=("about",))
        model = _fingerprint(tree["model"])
        layers = {
            name: _layer(value, f"layers[{shown(name)}]", model.heads)
            for name, value in expect_object(tree["layers"], "layers").items()
        }
        about = expect_object(tree.get("about", {}), "about")
        for name, value in about.items():
            if value is not None and not isinstance(value, str | int | float):
                raise RecipeError(f"about[{shown(name)}]={shown(value)}: expected a string, number, boolean or null")
        return cls(model, layers, about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to a file, all or nothing."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(self.to_json(), encoding="utf-8")
        part.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a file.

        Args:
            path: A JSON file.

        Returns:
            The recipe.

        Raises:
            RecipeError: If the file cannot be read, is too large, or is not a recipe.
        """
        try:
            with Path(path).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise RecipeError(f"path={str(path)!r}: cannot be read: {error.strerror}") from error
        try:
            return cls.from_json(data)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error


def cover(choices: tuple[Choice, ...], heads: int | None, where: str) -> None:
    """Check that `choices` choose exactly once for each of `heads` query heads (None: unknown, only repeats are seen).

    Args:
        choices: Of one layer and phase.
        heads: Query heads of the layer.
        where: Names the place in messages.

    Raises:
        RecipeError: Naming the heads.
    """
    if any(choice.heads == "all" for choice in choices):
        if len(choices) > 1:
            raise RecipeError(f"{where}: {len(choices)} choices and one for all heads, expected every head once")
        return
    chosen = [head for choice in choices for head in choice.heads]
    expected = len(chosen) if heads is None else heads
    if sorted(chosen) != list(range(expected)):
        raise RecipeError(f"{where}: heads {shown(sorted(chosen))}, expected each of 0 to {expected - 1} exactly once")


def _dump(choices: tuple[Choice, ...]) -> list[dict[str, Any]]:
    return [
        {
            "heads": choice.heads,
            "mechanism": choice.mechanism,
            "settings": dict(choice.settings),
            "min_tokens": choice.min_tokens,
        }
        for choice in choices
    ]


def _layer(value: Any, where: str, heads: int | None) -> LayerRecipe:
    tree = expect_object(value, where)
    expect_keys(tree, where, PHASES)
    return LayerRecipe(*(_choices(tree[phase], f"{where}.{phase}", heads) for phase in PHASES))


def _choices(value: Any, where: str, heads: int | None) -> tuple[Choice, ...]:
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where}={shown(value)}: expected a list of at least one choice")
    choices = tuple(_choice(item, f"{where}[{place}]") for place, item in enumerate(value))
    cover(choices, heads, where)
    return choices


def _choice(value: Any, where: str) -> Choice:
    tree = expect_object(value, where)
    expect_keys(tree, where, ("heads", "mechanism", "settings"), optional=("min_tokens",))
    heads, mechanism, min_tokens = tree["heads"], tree["mechanism"], tree.get("min_tokens", 0)
    if heads != "all":
        good = isinstance(heads, list) and heads and all(type(head) is int and head >= 0 for head in heads)
        if not good or sorted(set(heads)) != heads:
            raise RecipeError(f'{where}.heads={shown(heads)}: expected "all" or ascending head numbers')
    if not isinstance(mechanism, str) or not mechanism:
        raise RecipeError(f"{where}.mechanism={shown(mechanism)}: expected the name of a mechanism or {DENSE!r}")
    settings = expect_object(tree["settings"], f"{where}.settings")
    if mechanism == DENSE and (set(settings) - {"engine"} or settings.get("engine", ENGINES[0]) not in ENGINES):
        expected = " or ".join(map(repr, ENGINES))
        raise RecipeError(f"{where}.settings={shown(settings)}: dense attention has one, 'engine': {expected}")
    if type(min_tokens) is not int or min_tokens < 0:
        raise RecipeError(f"{where}.min_tokens={shown(min_tokens)}: expected a count of at least 0")
    return Choice(heads, mechanism, settings, min_tokens)


def _fingerprint(value: Any) -> Fingerprint:
    tree = expect_object(value, "model")
    names = tuple(item.name for item in fields(Fingerprint))
    expect_keys(tree, "model", names)
    for name in names:
        item = tree[name]
        if name in ("architecture", "weights"):
            if not isinstance(item, str) or not item:
                raise RecipeError(f"model.{name}={shown(item)}: expected a string")
        elif item is not None and (type(item) is not int or item < 1):
            raise RecipeError(f"model.{name}={shown(item)}: expected a count of at least 1, or null")
    return Fingerprint(**tree)
