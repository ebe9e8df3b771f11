"""What a layer's key/value cache keeps, reads and stores: the `cache` of a recipe's layer, and its strict parser.

```json
{"keep": {"policy": "h2o", "settings": {"heavy": 256, "recent": 256}},
 "read": {"policy": "tidal_decode", "settings": {"tokens": 256}},
 "store": {"bits": 8, "group": 32}}
```

Each axis may be left out and then saves nothing. `store` holds fields of `Storage`, or names a policy as the others do.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from saccade.catalog import cards
from saccade.catalog.settings import check_settings
from saccade.mechanisms.cache.base import CachePolicy, Composed, Everything, compose
from saccade.mechanisms.cache.storage import Storage
from saccade.plug.choices import DENSE
from saccade.plug.strict_json import RecipeError, expect_keys, expect_object, frozen, shown
from saccade.types import Kind

if TYPE_CHECKING:
    from saccade.plug.recipe import LayerRecipe

AXES = {"keep": "keep", "read": "read", "store": "storage"}
"""Axes of a cache, each with the method of `CachePolicy` that a policy of that axis overrides."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What `store` may name as its `dtype`."""


@dataclass(frozen=True)
class PolicyChoice:
    """A cache policy for one axis.

    Args:
        policy: Registry name.
        settings: Hyperparameters; what is left out has its default. Lists are held as tuples.
    """

    policy: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", frozen(dict(self.settings)))


@dataclass(frozen=True)
class LayerCache:
    """What a layer's cache keeps, reads and stores.

    Args:
        keep: Says what is evicted; None for nothing.
        read: Says what a step reads; None for everything.
        store: Says how it is stored; None for floating point as it comes.
    """

    keep: PolicyChoice | None = None
    read: PolicyChoice | None = None
    store: PolicyChoice | Storage | None = None

    def build(self, where: str = "cache") -> CachePolicy:
        """The policy.

        Args:
            where: Names the place in messages.

        Returns:
            One policy of the three.

        Raises:
            RecipeError: If a policy is unknown, not of its axis, or a setting out of range, or the three do not fit.
        """
        parts: dict[str, Any] = {axis: getattr(self, axis) for axis in AXES}
        for axis, part in parts.items():
            if isinstance(part, PolicyChoice):
                parts[axis] = _built(part, axis, f"{where}.{axis}")
        try:
            return compose(**parts)
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from error


def axes_of(target: type) -> tuple[str, ...]:
    """The axes that a class of cache policies decides."""
    return tuple(axis for axis, name in AXES.items() if getattr(target, name) is not getattr(CachePolicy, name))


def _built(choice: PolicyChoice, axis: str, where: str) -> CachePolicy:
    """The policy of one axis."""
    known = {card.name: card for card in cards() if card.kind is Kind.CACHE_POLICY}
    if choice.policy not in known:
        nearest = difflib.get_close_matches(choice.policy, known, n=1)
        hint = f", nearest is {nearest[0]!r}" if nearest else ""
        raise RecipeError(f"{where}.policy={shown(choice.policy)}: there is no such cache policy{hint}")
    card = known[choice.policy]
    if axis not in axes_of(card.target):
        raise RecipeError(
            f"{where}.policy={shown(choice.policy)}: expected a policy of the axis {axis!r}, this one decides "
            f"{' and '.join(map(repr, axes_of(card.target)))}"
        )
    try:
        check_settings(card.target, choice.settings)
        policy: CachePolicy = card.target(**choice.settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}.settings of {choice.policy!r}: {error}") from error
    return policy


def parse_cache(value: Any, where: str) -> LayerCache:
    """The `cache` of a layer from JSON.

    Args:
        value: The parsed JSON.
        where: Names the place in messages.

    Returns:
        What it says.

    Raises:
        RecipeError: Saying where it is wrong and what is expected there.
    """
    tree = expect_object(value, where)
    expect_keys(tree, where, (), optional=tuple(AXES))
    parts: dict[str, Any] = {}
    for axis, given in tree.items():
        place = f"{where}.{axis}"
        fields = expect_object(given, place)
        storage = axis == "store" and "policy" not in fields
        parts[axis] = _storage(fields, place) if storage else _policy(fields, place)
    cache = LayerCache(**parts)
    cache.build(where)
    return cache


def _policy(tree: dict[str, Any], where: str) -> PolicyChoice:
    expect_keys(tree, where, ("policy",), optional=("settings",))
    name = tree["policy"]
    if not isinstance(name, str) or not name:
        raise RecipeError(f"{where}.policy={shown(name)}: expected the name of a cache policy")
    return PolicyChoice(name, expect_object(tree.get("settings", {}), f"{where}.settings"))


def _storage(tree: dict[str, Any], where: str) -> Storage:
    expect_keys(tree, where, (), optional=tuple(item.name for item in dataclasses.fields(Storage)))
    settings = dict(frozen(tree))
    name = settings.get("dtype")
    if name is not None:
        if not isinstance(name, str) or name not in DTYPES:
            raise RecipeError(f"{where}.dtype={shown(name)}: expected {', '.join(DTYPES)} or null")
        settings["dtype"] = DTYPES[name]
    try:
        check_settings(Storage, settings)
        return Storage(**settings)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def dump_cache(cache: LayerCache) -> dict[str, Any]:
    """The inverse of `parse_cache`; what has its default is left out."""
    tree: dict[str, Any] = {}
    for axis in AXES:
        part = getattr(cache, axis)
        if isinstance(part, PolicyChoice):
            tree[axis] = {"policy": part.policy, "settings": dict(part.settings)}
        elif part is not None:
            tree[axis] = {name: str(x).removeprefix("torch.") if name == "dtype" else x for name, x in _changed(part)}
    return tree


def check_caches(layers: Mapping[str, LayerRecipe]) -> None:
    """Refuse what cannot run beside a cache: its policies say what decoding reads, and some need all of the prefill.

    Args:
        layers: Of a recipe.

    Raises:
        RecipeError: Naming the layer and the mechanism.
    """
    cached = [name for name, layer in layers.items() if layer.cache is not None]
    for name, layer in layers.items() if cached else ():
        where = f"layers[{shown(name)}]"
        for choice in layer.decode:
            if choice.mechanism != DENSE:
                raise RecipeError(
                    f"{where}.decode: mechanism={choice.mechanism!r}, expected {DENSE!r}: layers[{shown(cached[0])}] "
                    "has a cache, and with one its policy says what is read"
                )
        needy = layer.cache is not None and layer.cache.build(f"{where}.cache").needs_lse
        sparse = [choice.mechanism for choice in layer.prefill if choice.mechanism != DENSE]
        if needy and sparse:
            raise RecipeError(
                f"{where}.prefill: mechanism={sparse[0]!r}, expected {DENSE!r}: the cache's 'keep' needs all the "
                "attention weights"
            )


def in_words(policy: CachePolicy) -> str:
    """A policy, short: `keep h2o(heavy=256, recent=256), store bits=8`."""
    if isinstance(policy, Composed):
        parts = {"keep": policy.keeper, "read": policy.reader, "store": policy.storer}
        said = [f"{axis} {_one(part)}" for axis, part in parts.items() if _one(part)]
        return ", ".join(said) if said else "everything"
    return _one(policy) or "everything"


def counted(words: Iterable[str], most: int = 3) -> str:
    """What the layers have, each in words: `store bits=8 in 27 layers; everything in 3`; no more than `most` kinds."""
    counts = Counter(words).most_common()
    if len(counts) == 1:
        return counts[0][0]
    (first, layers), *others = counts[:most]
    said = [f"{first} in {layers} layers", *(f"{word} in {count}" for word, count in others)]
    rest = counts[most:]
    if rest:
        said.append(f"{len(rest)} more in {sum(count for _, count in rest)}")
    return "; ".join(said)


def _one(policy: CachePolicy) -> str:
    """A policy that is not composed; "" if it saves nothing."""
    if isinstance(policy, Everything):
        return " ".join(f"{name}={x}".replace("=torch.", "=") for name, x in _changed(policy.form))
    if not dataclasses.is_dataclass(policy):
        return repr(policy)
    card = getattr(type(policy), "card", None)
    settings = ((item.name, getattr(policy, item.name)) for item in dataclasses.fields(policy) if item.init)
    return f"{type(policy).__name__ if card is None else card.name}({', '.join(f'{n}={x}' for n, x in settings)})"


def _changed(part: Any) -> list[tuple[str, Any]]:
    """Fields of a dataclass that differ from their defaults."""
    return [(f.name, getattr(part, f.name)) for f in dataclasses.fields(part) if getattr(part, f.name) != f.default]


__all__ = [
    "AXES", "LayerCache", "PolicyChoice", "axes_of", "check_caches", "counted", "dump_cache", "in_words", "parse_cache",
]  # fmt: skip
