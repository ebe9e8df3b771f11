"""Which key/value cache a tuned model gets: everything kept in pages, where that is the faster way to decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops import decode_attend, recording
from saccade.plug import LayerCache, Recipe, apply
from saccade.tune.candidates import DENSE, Candidate
from saccade.types import KVPages

TOLERANCE = 1e-2
"""Largest difference of logits, absolute and relative, at which two caches are taken to be the same."""


def exact_cache(model: Any, dense: Candidate) -> tuple[LayerCache | None, str]:
    """The cache of layers that keep everything as it comes, if it can serve the model and is worth it.

    Pages are read in place by a kernel; without one decoding would gather them first, which transformers' own cache
    need not.

    Args:
        model: A transformers causal language model.
        dense: Dense attention as the recipe will have it.

    Returns:
        The cache, or None, and why there is none.
    """
    x = torch.zeros(1, 1, 64, 16, device=model.device, dtype=model.dtype)
    with recording() as records:
        decode_attend(x[:, :, :1], KVPages.from_dense(x, x))
    if records[0].impl != "cpu":
        return None, f"decoding from pages has no kernel here: {records[0].refused.get('cpu', records[0].impl)}"
    cache = LayerCache()
    try:
        same = _same_logits(model, Recipe.uniform(model, DENSE, dense.settings, cache=cache))
    except (ValueError, TypeError, AttributeError) as error:
        return None, f"the model cannot use a PagedCache: {error}"
    return (cache, "") if same else (None, "the model's logits are others with a PagedCache")


@torch.no_grad()
def _same_logits(model: Any, recipe: Recipe) -> bool:
    """Whether a few tokens, a prompt and one more, give the logits they give at once without a cache."""
    ids = torch.arange(1, 6, device=model.device)[None]
    expected: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1]
    with apply(model, recipe):
        cache = recipe.make_cache(model)
        model(input_ids=ids[:, :-1], past_key_values=cache)
        found: Tensor = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1]
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
