"""JSON that is taken in strictly: no repeated or unknown keys, no NaN, bounded size and depth, one kind of error."""

from __future__ import annotations

import json
from typing import Any

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 12


class RecipeError(ValueError):
    """A recipe that is not well formed, or not for this model."""


def parse(text: str | bytes) -> Any:
    """JSON without repeated keys, NaN and infinities, of bounded size and depth."""
    if len(text) > MAX_BYTES:
        raise RecipeError(f"recipe of more than {MAX_BYTES} bytes: expected a smaller one")
    try:
        tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecipeError:
        raise
    except RecursionError as error:
        raise RecipeError(f"recipe nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise RecipeError(f"recipe is not complete JSON: {error}") from error
    if _depth(tree) > MAX_DEPTH:
        raise RecipeError(f"recipe nested deeper than {MAX_DEPTH} levels")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise RecipeError(f"key {shown(repeated)} appears twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise RecipeError(f"recipe holds {name}: expected finite numbers")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise RecipeError(f"recipe holds {text[:40]}: expected finite numbers")
    return value


def _depth(tree: Any) -> int:
    """Levels of nesting, counted level by level so that depth cannot exhaust the stack."""
    levels, level = 0, [tree]
    while level:
        levels += 1
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return levels


def expect_object(value: Any, where: str) -> dict[str, Any]:
    """`value`, which must be a JSON object."""
    if not isinstance(value, dict):
        raise RecipeError(f"{where}={shown(value)}: expected an object")
    return value


def expect_keys(tree: dict[str, Any], where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Refuse unknown and missing keys."""
    unknown = sorted(set(tree) - set(required) - set(optional))
    if unknown:
        raise RecipeError(f"{where}: unknown key {shown(unknown[0])}, expected {', '.join(required + optional)}")
    missing = [name for name in required if name not in tree]
    if missing:
        raise RecipeError(f"{where}: key {missing[0]!r} is missing")


def shown(value: Any) -> str:
    """`repr`, cut to what fits a message."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def frozen(value: Any) -> Any:
    """`value` with its lists as tuples, at every level."""
    if isinstance(value, list | tuple):
        return tuple(frozen(item) for item in value)
    return {name: frozen(item) for name, item in value.items()} if isinstance(value, dict) else value
