"""Policies that compress prompts, in `generate()`: both protocols, padding, and dense at full budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.adakv import AdaKV
from saccade.mechanisms.cache.base import CachePolicy
from saccade.mechanisms.cache.pyramidkv import PyramidKV
from saccade.mechanisms.cache.snapkv import SnapKV
from saccade.plug import PagedCache, Recipe, apply

Build = Callable[..., Any]
POLICIES = [SnapKV, PyramidKV, AdaKV]


def generate(model: Any, ids: Tensor, cache: PagedCache | None = None, **options: Any) -> Tensor:
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=10, min_new_tokens=10, do_sample=False, **options
    )  # fmt: skip


@pytest.mark.parametrize("policy", [kind(**kind.card.exact(40)) for kind in POLICIES], ids=repr)
def test_full_budget_gives_the_same_tokens(tiny: Build, ids: Tensor, policy: CachePolicy) -> None:
    model = tiny()
    expected = generate(model, ids)
    with apply(model, Recipe.uniform(model, "dense")):
        assert torch.equal(generate(model, ids, PagedCache(model, policy)), expected)


@pytest.mark.parametrize("kind", POLICIES)
def test_left_padded_batch_equals_one_by_one(tiny: Build, ids: Tensor, kind: type[CachePolicy]) -> None:
    model, short, policy = tiny(), 23, kind(**kind.card.example)
    padded, keep = ids.clone(), torch.ones_like(ids)
    padded[1, : 40 - short] = 0
    keep[1, : 40 - short] = 0
    with apply(model, Recipe.uniform(model, "dense", {"engine": "saccade"})):
        together = generate(model, padded, PagedCache(model, policy), attention_mask=keep)
        assert torch.equal(together[:1], generate(model, ids[:1], PagedCache(model, policy)))
        alone = padded[1:, 40 - short :]
        assert torch.equal(together[1:, 40 - short :], generate(model, alone, PagedCache(model, policy)))


@pytest.mark.parametrize("kind", POLICIES)
def test_question_aware_or_agnostic_is_what_the_prompt_is(tiny: Build, ids: Tensor, kind: type[CachePolicy]) -> None:
    model, settings = tiny(), kind.card.example
    with apply(model, Recipe.uniform(model, "dense")), torch.no_grad():
        aware = PagedCache(model, kind(**settings))
        generate(model, ids, aware)
        agnostic = PagedCache(model, kind(**settings))
        model(ids[:, :32], past_key_values=agnostic)
        generate(model, ids, agnostic)
        chunks = PagedCache(model, kind(**settings, prompt=32))
        for part in ids[:, :32].split([15, 16, 1], 1):
            model(part, past_key_values=chunks)
        generate(model, ids, chunks)
    kept = [sum(int(layer.store.lengths.sum()) for layer in cache.layers) // 8 for cache in (aware, agnostic, chunks)]
    mean = 15 if kind is AdaKV else 16  # its budgets are rounded down
    assert kept == [mean + 9, mean + 17, mean + 17]
    for one, other in zip(agnostic.layers, chunks.layers, strict=True):
        one.store.sort()
        other.store.sort()
        assert torch.equal(one.store.positions, other.store.positions)
