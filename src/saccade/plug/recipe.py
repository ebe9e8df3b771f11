"""Recipes: which mechanism each layer of one model uses, as JSON that is checked to the last key.

```json
{"version": 3,
 "model": {"architecture": "LlamaForCausalLM", "layers": 30, "heads": 9, ..., "weights": "<sha-256>"},
 "layers": {"model.layers.0.self_attn": {
   "prefill": [{"heads": "all", "mechanism": "sink_window", "settings": {"window": 1024}, "dtype": "bfloat16"}],
   "decode": [{"heads": [0, 1, 2], "mechanism": "dense", "settings": {}}, ...],
   "cache": {"keep": {"policy": "h2o", "settings": {"heavy": 256}}, "store": {"bits": 8}}}},
 "about": {"context": 8192}}
```

Layers are named exactly as `model.named_modules()` names their attention modules; a layer that is not named stays as it
is. In each phase (prefill: more than one query; decode: one) every head is chosen for exactly once. `cache`, which may
be left out, says what the layer's key/value cache keeps, reads and stores (see `cache_recipe`). `about` holds notes and
is not interpreted.

Version 2 added `cache`, version 3 `dtype`: what the attention of these heads is computed in, in prefill. A recipe is
written as the lowest version that can say what it says, so that earlier releases read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.catalog import get
from saccade.plug.cache_recipe import LayerCache, check_caches, dump_cache, parse_cache
from saccade.plug.choices import DENSE, DTYPES, ENGINES, Choice, cover, dump_choices, parse_choices
from saccade.plug.fingerprint import Fingerprint, fingerprint
from saccade.plug.layers import attention_layers
from saccade.plug.strict_json import MAX_BYTES, RecipeError, expect_keys, expect_object, parse, shown

if TYPE_CHECKING:
    from saccade.mechanisms.cache.tiers import Tier
    from saccade.plug.cache import PagedCache

VERSION = 3
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class LayerRecipe:
    """What a layer uses.

    Args:
        prefill: For calls with more than one query, choices that cover every head exactly once.
        decode: For calls with one query, likewise.
        cache: What its key/value cache keeps, reads and stores; None for everything, as it comes.
    """

    prefill: tuple[Choice, ...]
    decode: tuple[Choice, ...]
    cache: LayerCache | None = None


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
        cache: LayerCache | None = None,
        about: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> Recipe:
        """The recipe that uses one mechanism in every layer and head of the (text) model.

        Args:
            model: A transformers model.
            mechanism: Registry name, or "dense".
            settings: Its hyperparameters.
            decode: Use it for single queries too; else, and if it is for prefill only, these stay dense.
            cache: What every layer's key/value cache keeps, reads and stores.
            about: Notes.

        Returns:
            The recipe, for this model only.
        """
        chosen = (Choice("all", mechanism, settings if settings is not None else {}),)
        once = mechanism != DENSE and bool(get(mechanism).prefill_only)
        layer = LayerRecipe(chosen, chosen if decode and not once else (Choice("all", DENSE),), cache)
        text = model.config.get_text_config()
        names = [name for name, module in attention_layers(model).items() if module.config is text]
        return cls(fingerprint(model), dict.fromkeys(names, layer), {} if about is None else about)

    @property
    def has_cache(self) -> bool:
        """Whether a layer says what its cache keeps, reads or stores: `make_cache` then makes what it asks for."""
        return any(layer.cache is not None for layer in self.layers.values())

    @property
    def _version(self) -> int:
        """The lowest that can say it."""
        if any(choice.dtype is not None for layer in self.layers.values() for choice in layer.prefill + layer.decode):
            return 3
        return 2 if self.has_cache else 1

    def make_cache(self, model: Any, tier: Tier | None = None) -> PagedCache:
        """The cache that this recipe asks for: `model.generate(**inputs, past_key_values=recipe.make_cache(model))`.

        Args:
            model: The model that this recipe is applied to.
            tier: Where pages live that are not read: a matter of the machine, so no part of a recipe; None for memory.

        Returns:
            An empty cache. Layers without a `cache` keep everything.

        Raises:
            ValueError: If no recipe is applied to the model, or a policy has no tier.
            RecipeError: If a policy is unknown, not of its axis, or a setting out of range.
        """
        from saccade.plug.cache import PagedCache

        check_caches(self.layers)
        numbers = {name: getattr(module, "layer_idx", None) for name, module in attention_layers(model).items()}
        policies = [LayerCache().build()] * int(model.config.get_text_config().num_hidden_layers)
        for name, layer in self.layers.items():
            if layer.cache is not None:
                number = numbers.get(name)
                if not isinstance(number, int) or number >= len(policies):
                    raise RecipeError(f"layers[{shown(name)}].cache: the model's layer of this name has no cache")
                policies[number] = layer.cache.build(f"layers[{shown(name)}].cache")
        return PagedCache(model, policies, tier)

    def to_json(self) -> str:
        """The recipe as JSON; `from_json` gives back an equal one.

        Returns:
            The text.

        Raises:
            RecipeError: If the recipe is not well formed.
        """
        tree = {
            "version": self._version,
            "model": asdict(self.model),
            "layers": {name: _dump(layer) for name, layer in self.layers.items()},
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
            raise RecipeError(f"version={shown(version)}: expected 1 to {VERSION}")
        if version > VERSION:
            raise RecipeError(f"version={shown(version)}: this Saccade reads up to {VERSION}; a newer one wrote it")
        expect_keys(tree, "recipe", ("version", "model", "layers"), optional=("about",))
        model = _fingerprint(tree["model"])
        layers = {
            name: _layer(value, f"layers[{shown(name)}]", model.heads, version)
            for name, value in expect_object(tree["layers"], "layers").items()
        }
        check_caches(layers)
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


def _dump(layer: LayerRecipe) -> dict[str, Any]:
    tree: dict[str, Any] = {phase: dump_choices(getattr(layer, phase)) for phase in PHASES}
    return tree if layer.cache is None else tree | {"cache": dump_cache(layer.cache)}


def _layer(value: Any, where: str, heads: int | None, version: int) -> LayerRecipe:
    tree = expect_object(value, where)
    expect_keys(tree, where, PHASES, optional=("cache",))
    prefill, decode = (parse_choices(tree[phase], f"{where}.{phase}", heads) for phase in PHASES)
    layer = LayerRecipe(prefill, decode)
    check_dtypes(layer, where)
    if version < 3 and any(choice.dtype is not None for choice in prefill):
        raise RecipeError(f"version={version}: expected 3 for the dtype in {where}.prefill")
    if "cache" not in tree:
        return layer
    if version < 2:
        raise RecipeError(f"version={version}: expected 2 for {where}.cache")
    return replace(layer, cache=parse_cache(tree["cache"], f"{where}.cache"))


def check_dtypes(layer: LayerRecipe, where: str) -> None:
    """Check what a layer's attention is computed in.

    Args:
        layer: Of a recipe.
        where: Names the place in messages.

    Raises:
        RecipeError: Naming the place.
    """
    for phase in PHASES:
        for place, choice in enumerate(getattr(layer, phase)):
            if choice.dtype is None:
                continue
            found = f"{where}.{phase}[{place}].dtype={shown(choice.dtype)}"
            if phase == "decode":
                raise RecipeError(f"{found}: expected none, a cache says what it stores keys and values in")
            if choice.dtype not in DTYPES:
                raise RecipeError(f"{found}: expected one of {', '.join(DTYPES)}, or none")
            if choice.mechanism == DENSE and choice.settings.get("engine", ENGINES[0]) == ENGINES[0]:
                raise RecipeError(f"{found}: expected settings {{'engine': 'saccade'}} beside it")


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


__all__ = [
    "DENSE", "DTYPES", "ENGINES", "PHASES", "VERSION", "Choice", "LayerCache", "LayerRecipe", "Recipe", "check_dtypes",
    "cover",
]  # fmt: skip
