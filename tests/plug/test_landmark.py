"""Landmark Attention in a model: the grouped softmax for the prompt, retrieved blocks for what is decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.mechanisms.cache.landmark import Landmark
from saccade.plug import Choice, LayerRecipe, PagedCache, Recipe, apply

Build = Callable[..., Any]
SOFTMAX = (Choice("all", "landmark_softmax", {"block": 5}),)
DENSE = (Choice("all", "dense"),)


def prompts_with(model: Any, decode: tuple[Choice, ...]) -> Recipe:
    """The grouped softmax in prefill, this in decoding."""
    recipe = Recipe.uniform(model, "dense")
    return Recipe(recipe.model, {name: LayerRecipe(SOFTMAX, decode) for name in recipe.layers})


def logits_by_steps(model: Any, ids: Tensor, prompt: int, blocks: int) -> Tensor:
    with apply(model, prompts_with(model, DENSE), strict=True), torch.no_grad():
        cache = PagedCache(model, Landmark(block=5, blocks=blocks))
        parts = [model(ids[:, :prompt], past_key_values=cache).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, ids.shape[1])]
    return torch.cat(parts, 1)


def test_with_all_blocks_steps_equal_the_grouped_softmax_over_the_whole_text(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    with apply(model, prompts_with(model, SOFTMAX), strict=True), torch.no_grad():
        whole = model(ids, use_cache=False).logits
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    assert float((whole - plain).abs().max()) > 0.01
    torch.testing.assert_close(logits_by_steps(model, ids, 23, blocks=8), whole, rtol=0, atol=1e-9)


def test_fewer_blocks_change_what_is_decoded_only(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    all_, one = (logits_by_steps(model, ids, 23, blocks=count) for count in (8, 1))
    torch.testing.assert_close(one[:, :23], all_[:, :23], rtol=0, atol=1e-12)
    assert float((one[:, 23:] - all_[:, 23:]).abs().max()) > 1e-3
