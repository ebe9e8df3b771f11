"""Saccade in models of other libraries: apply a recipe, see what ran, undo it.

`Recipe` needs nothing but torch; the rest needs transformers and is imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from saccade.plug.cache_recipe import LayerCache, PolicyChoice
from saccade.plug.fingerprint import Fingerprint, fingerprint
from saccade.plug.layers import attention_layers
from saccade.plug.recipe import Choice, LayerRecipe, Recipe
from saccade.plug.strict_json import RecipeError

if TYPE_CHECKING:
    from saccade.plug.cache import PagedCache
    from saccade.plug.explanation import Explanation, explain
    from saccade.plug.observation import watch
    from saccade.plug.state import Observation
    from saccade.plug.transformers import Handle, apply, patchable_layers

__all__ = [
    "Choice", "Explanation", "Fingerprint", "Handle", "LayerCache", "LayerRecipe", "Observation", "PagedCache",
    "PolicyChoice", "Recipe", "RecipeError", "apply", "attention_layers", "explain", "fingerprint",
    "patchable_layers", "watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    homes = {
        "Explanation": "explanation",
        "explain": "explanation",
        "Observation": "state",
        "watch": "observation",
        "PagedCache": "cache",
    }
    homes |= dict.fromkeys(("Handle", "apply", "patchable_layers"), "transformers")
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
