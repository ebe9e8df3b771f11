"""Of law 14 for cache policies: a cache that is saved in the midst of generation and loaded elsewhere goes on."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from saccade.laws.base import expect, expect_equal

MOMENTS = (1, 12)
"""Calls after which the cache is saved: the prompt, and steps that leave policies between two of whatever they do."""

AFTER = 8
"""Steps that are compared."""


@torch.no_grad()
def goes_on_elsewhere(model: Any, other: Any, recipe: Any, ids: Tensor, shown: Tensor) -> None:
    """Decode with a cache, and with what another model's cache has loaded of it: logits are equal to the bit.

    Args:
        model: With `recipe` applied.
        other: Another object with the same weights, `recipe` applied.
        recipe: With a cache.
        ids: int64 `[B, N]`, the prompt.
        shown: int64 `[B, N]`, 0 for padding.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder, "cache.safetensors")
        for moment in MOMENTS:
            cache, loaded = recipe.make_cache(model), recipe.make_cache(other)
            tokens, mask = ids, shown
            for call in range(moment + AFTER):
                logits = model(tokens, attention_mask=mask, past_key_values=cache).logits[:, -1]
                if call >= moment:
                    again = other(tokens, attention_mask=mask, past_key_values=loaded).logits[:, -1]
                    expect_equal(again, logits, f"logits of call {call}, loaded after {moment}")
                tokens, mask = logits.argmax(-1, keepdim=True), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                if call == moment - 1:
                    cache.save(path)
                    loaded.load(path)
                    sizes = loaded.nbytes, cache.nbytes
                    expect(sizes[0] <= sizes[1], f"bytes of a loaded cache and of the one it was: {sizes}")


__all__ = ["goes_on_elsewhere"]
