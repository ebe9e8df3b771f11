"""Looking at what a model's attention layers run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from saccade.plug.recipe import DENSE, Recipe
from saccade.plug.state import STATE, Observation
from saccade.plug.transformers import apply


@contextmanager
def watch(model: nn.Module, observe: Callable[[Observation], None], recipe: Recipe | None = None) -> Iterator[None]:
    """Inside, every attention layer of `model` shows its queries, keys and values to `observe`, then runs.

    Args:
        model: A transformers model without a recipe.
        observe: Called with an `Observation` before each layer's attention runs.
        recipe: What the layers run meanwhile; None for what they ran before.

    Raises:
        ValueError: If the model cannot be patched, or has a recipe applied.
    """
    with apply(model, Recipe.uniform(model, DENSE) if recipe is None else recipe, record=False):
        for module in model.modules():
            if STATE in module.__dict__:
                module.__dict__[STATE].observe = observe
        yield
