"""Types of settings: what comes from a recipe or a command line is checked against the annotations of the class."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union


@cache
def setting_types(target: type) -> dict[str, Any]:
    """Resolved annotation of every parameter of `target`'s constructor; unannotated or unresolvable ones are `Any`."""
    parameters = [p for p in inspect.signature(target).parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints: dict[str, Any] = {}
    for owner in (target.__init__, target):  # type: ignore[misc]  # inherited fields are known to their own module
        try:
            hints = typing.get_type_hints(owner)
            break
        except NameError:  # a name imported for type checkers only
            continue
    return {parameter.name: hints.get(parameter.name, Any) for parameter in parameters}


def check_settings(target: type, settings: Mapping[str, Any]) -> None:
    """Check the names and types of `settings`; NaN is no number, a bool no integer, and a list may stand for a tuple.

    Args:
        target: The class whose constructor they go to.
        settings: Values by name.

    Raises:
        ValueError: `name=value: expected ...` for the first that does not fit.
        TypeError: If a name is unknown, as the constructor itself would.
    """
    hints = setting_types(target)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values())
    for name, value in settings.items():
        if name not in hints and not takes_any:
            raise TypeError(f"got an unexpected keyword argument {name!r}, expected {', '.join(hints) or 'none'}")
        if name in hints and not fits(value, hints[name]):
            raise ValueError(f"{name}={value!r}: expected {described(hints[name])}")


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of type `hint`; True for annotations that cannot be checked."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin in (tuple, list, Sequence):
        return _fits_sequence(value, origin, inner)
    if hint is None or hint is types.NoneType:
        return value is None
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and value == value  # noqa: PLR0124  not NaN
    if hint is Callable or origin is Callable:
        return callable(value)
    checked = origin if origin is not None else hint
    return isinstance(value, checked) if isinstance(checked, type) else True


def _fits_sequence(value: Any, origin: Any, inner: tuple[Any, ...]) -> bool:
    if not isinstance(value, (list, tuple)):
        return False
    if origin is tuple and not (len(inner) == 2 and inner[1] is ...):
        return len(value) == len(inner) and all(fits(x, one) for x, one in zip(value, inner, strict=True))
    return not inner or all(fits(x, inner[0]) for x in value)


def described(hint: Any) -> str:
    """`hint` as it is written."""
    return "None" if hint is types.NoneType else inspect.formatannotation(hint).replace("typing.", "")


__all__ = ["check_settings", "described", "fits", "setting_types"]
