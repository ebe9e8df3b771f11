"""Types of settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest

from saccade.catalog import Budget, cards, get
from saccade.catalog.settings import check_settings, described, fits, setting_types

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, (0, -3), (1.0, True, "1", None, math.nan)),
        (float, (1, 0.5, math.inf), (math.nan, False, "0.5", None)),
        (bool, (True, False), (0, 1, "yes", None)),
        (str, ("", "a"), (1, None)),
        (int | None, (2, None), (2.5, "2")),
        (tuple[int, int], ((1, 2), [1, 2]), ((1,), (1, 2, 3), (1, 2.5), "12", 1)),
        (tuple[int, ...] | None, ((), (1, 2, 3), [4], None), ((1.5,), 1)),
        (list[str], (["a"], ("a", "b")), ([1], "ab")),
        (Literal["a", 1], ("a", 1), ("b", True, 1.0)),
        (Callable[[int], int], (len,), (3,)),
        (dict[str, int], ({},), ([],)),
        (None, (None,), (0,)),
        (Any, ("x", None), ()),
    ],
    ids=str,
)
def test_fits(hint: Any, good: tuple, bad: tuple) -> None:
    assert [value for value in good if not fits(value, hint)] == []
    assert [value for value in bad if fits(value, hint)] == []


class Example:
    def __init__(self, size: int, share: float | None = None, anything=None) -> None:
        self.size, self.share, self.anything = size, share, anything


def test_types_come_from_the_constructor() -> None:
    assert setting_types(Example) == {"size": int, "share": float | None, "anything": Any}
    assert setting_types(get("pab").target)["window"] == tuple[float, float]
    assert described(float | None) == "float | None"
    assert described(type(None)) == "None"


def test_wrong_types_are_refused_by_name_and_value() -> None:
    with pytest.raises(ValueError, match="size='2': expected int"):
        check_settings(Example, {"size": "2"})
    with pytest.raises(ValueError, match="share=nan: expected float | None"):
        check_settings(Example, {"size": 2, "share": math.nan})
    with pytest.raises(TypeError, match="unexpected keyword argument 'sise', expected size, share, anything"):
        check_settings(Example, {"sise": 2})
    check_settings(Example, {"size": 2, "share": 1, "anything": "x"})


def test_an_unresolvable_annotation_is_not_checked() -> None:
    class Unresolvable:
        def __init__(self, x: NoSuchName) -> None:  # noqa: F821
            self.x = x

    assert setting_types(Unresolvable) == {"x": Any}


def test_cards_check_types_before_building() -> None:
    with pytest.raises(ValueError, match="window=2.5: expected int"):
        get("sink_window").build(window=2.5)
    with pytest.raises(ValueError, match=r"window=\(100,\): expected tuple\[float, float\]"):
        get("pab").build(window=(100,))


def test_examples_exact_settings_and_ladders_fit() -> None:
    for card in cards():
        rungs = [card.example, *(card.ladder(256) if card.ladder else ()), *([card.exact(256)] if card.exact else ())]
        budgets = [Budget(part, 2048, 30, 1e5) for part in (0.5, 0.25, 0.1)] + [Budget(0.5, 64)]
        rungs += [settings for b in budgets if card.at_budget and (settings := card.at_budget(b)) is not None]
        for settings in rungs:
            check_settings(card.target, settings)
            card.build(**settings)
        assert Any not in setting_types(card.target).values(), card.name


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 100), "part=0: expected a budget above 0 and at most 1"),
        ((-0.1, 100), "part=-0.1: expected a budget above 0"),
        ((1.01, 100), "part=1.01: expected a budget above 0"),
        ((math.nan, 100), "part=nan: expected a budget above 0"),
        ((0.5, 0), "tokens=0: expected at least 1"),
        ((0.5, 10, 0), "layers=0: expected at least 1"),
    ],
)
def test_bad_budgets(numbers: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(*numbers)
    assert (Budget(1, 100).count, Budget(0.25, 100).count, Budget(0.01, 100).count) == (100, 25, 8)
