"""What some heads of a layer use in one phase: the choices of a recipe, and their strict parser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from saccade.plug.strict_json import RecipeError, expect_keys, expect_object, frozen, shown

DENSE = "dense"
"""Name of the choice that computes every pair: as the model had it, or on Saccade's engine (see `ENGINES`)."""

ENGINES = ("model", "saccade")
"""What may run dense attention, its one setting `engine`. The model's own is the default and equal to the bit."""

DTYPES = ("bfloat16", "float16")
"""What a choice's attention may be computed in, in place of the model's own dtype."""


@dataclass(frozen=True)
class Choice:
    """What some heads of a layer use.

    Args:
        heads: "all", or indices of query heads, ascending.
        mechanism: Registry name, or "dense".
        settings: Hyperparameters of the mechanism; what is left out has its default. Lists are held as tuples.
        min_tokens: Calls with fewer keys run dense, which is faster below the crossover length.
        dtype: Queries, keys and values are rounded to it, one of `DTYPES`, and outputs are given back in the model's:
            half the bytes, and faster products. None leaves them as they are.
    """

    heads: Literal["all"] | tuple[int, ...]
    mechanism: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    min_tokens: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", frozen(self.heads))
        object.__setattr__(self, "settings", frozen(dict(self.settings)))


def label(mechanism: str, settings: Mapping[str, Any], dtype: str | None) -> str:
    """`name(setting=value, ...) in dtype`, without what is left out."""
    inside = ", ".join(f"{name}={value}" for name, value in settings.items())
    return (f"{mechanism}({inside})" if inside else mechanism) + ("" if dtype is None else f" in {dtype}")


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


def dump_choices(choices: tuple[Choice, ...]) -> list[dict[str, Any]]:
    """The inverse of `parse_choices`."""
    return [
        {
            "heads": choice.heads,
            "mechanism": choice.mechanism,
            "settings": dict(choice.settings),
            "min_tokens": choice.min_tokens,
        }
        | ({} if choice.dtype is None else {"dtype": choice.dtype})
        for choice in choices
    ]


def parse_choices(value: Any, where: str, heads: int | None) -> tuple[Choice, ...]:
    """The choices of one layer and phase from parsed JSON, checked as `cover` does.

    Args:
        value: The parsed JSON.
        where: Names the place in messages.
        heads: Query heads of the layer, or None if unknown.

    Returns:
        The choices.

    Raises:
        RecipeError: Saying where it is wrong and what is expected there.
    """
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where}={shown(value)}: expected a list of at least one choice")
    choices = tuple(_choice(item, f"{where}[{place}]") for place, item in enumerate(value))
    cover(choices, heads, where)
    return choices


def _choice(value: Any, where: str) -> Choice:
    tree = expect_object(value, where)
    expect_keys(tree, where, ("heads", "mechanism", "settings"), optional=("min_tokens", "dtype"))
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
    return Choice(heads, mechanism, settings, min_tokens, tree.get("dtype"))


__all__ = ["DENSE", "DTYPES", "ENGINES", "Choice", "cover", "dump_choices", "label", "parse_choices"]
