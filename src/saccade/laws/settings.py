"""Law 10 for settings: unknown ones, wrong types, NaN and values out of range are refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from saccade.catalog import Card
from saccade.catalog.settings import fits, setting_types
from saccade.laws.base import Broken, expect, expect_refusal

STRANGERS: tuple[Any, ...] = ("no such value", 3.5, {"a": object})
"""Values of which at least one is of the wrong type for any annotation but `Any`."""


def refuse_settings(card: Card, smoke: Callable[[dict[str, Any]], Any]) -> str:
    """Every setting refuses a value of the wrong type and NaN; -7 is refused, or runs.

    Args:
        card: Of the mechanism.
        smoke: Builds the mechanism from settings and runs it once.

    Returns:
        What was checked, in words.
    """
    example = dict(card.example)
    expect_refusal(lambda: card.build(**{**example, "no_such_setting": 1}), "no_such_setting", "an unknown setting")
    legal = []
    for name, hint in setting_types(card.target).items():
        stranger = next((value for value in STRANGERS if not fits(value, hint)), None)
        for value in (stranger, math.nan if fits(0.5, hint) else None):
            if value is not None:
                expect_refusal(lambda: card.build(**{**example, name: value}), name, f"{name}={value!r}")  # noqa: B023
        if fits(-7, hint) and _runs(card, {**example, name: -7}, name, smoke):
            legal.append(name)
    return "bad settings" + (f" (-7 is legal for {', '.join(legal)})" if legal else "")


def _runs(card: Card, settings: dict[str, Any], name: str, smoke: Callable[[dict[str, Any]], Any]) -> bool:
    """False if -7 is refused by name when built or run; True if the mechanism runs with it."""
    try:
        smoke(settings)
    except ValueError as error:
        expect(name in str(error), f"{name}=-7: the error of {card.name} does not name it: {error}")
        return False
    except Exception as error:
        raise Broken(f"{name}=-7: accepted, then {type(error).__name__}: {error}") from error
    return True
