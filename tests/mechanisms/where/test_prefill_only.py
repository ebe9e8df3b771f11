"""Mechanisms that let the last queries choose for all: how the card, the laws, the plug and the tuner treat them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.catalog import card as card_module
from saccade.catalog import cards, get, register
from saccade.laws import LAWS, run_law
from saccade.laws.models import tiny_llama
from saccade.mechanisms.base import Selector
from saccade.plug import Choice, LayerRecipe, Recipe, apply, explain
from saccade.tune.candidates import find_candidates
from saccade.types import Kind

NAMES = ("dhsa", "flex_prefill", "minference", "pbs_attn")
CAUSALITY, ONE_ANSWER = LAWS[3], LAWS[4]


@pytest.fixture
def model() -> Any:
    pytest.importorskip("transformers")
    return tiny_llama(hidden=32, device="cpu")


def test_the_declared_ones() -> None:
    assert set(NAMES) <= {card.name for card in cards() if card.prefill_only}


@pytest.mark.parametrize("name", NAMES)
def test_laws_4_and_5_are_skipped_with_the_cards_reason(name: str) -> None:
    for law in (CAUSALITY, ONE_ANSWER):
        verdict = run_law(law, get(name))
        assert verdict.status == "skipped"
        assert verdict.detail.startswith("prefill only")
        assert verdict.detail.endswith(get(name).prefill_only)


def test_law_4_still_fails_if_later_values_reach_earlier_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(self: Selector, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return plain(self, q, k, v, **options) + v.mean(2, keepdim=True).mean(1, keepdim=True)

    plain = Selector.__call__
    monkeypatch.setattr(get("pbs_attn").target, "__call__", leaking)
    verdict = run_law(CAUSALITY, get("pbs_attn"))
    assert verdict.status == "failed"
    assert "outputs before token" in verdict.detail


def test_the_tuner_leaves_them_out_and_says_why() -> None:
    _, left_out = find_candidates(1024)
    for name in NAMES:
        assert left_out[name] == (
            f"prefill only, so that the likelihood of a text does not measure it: {get(name).prefill_only}"
        )
    with pytest.raises(ValueError, match="mechanisms='pbs_attn': cannot be tuned: prefill only, so that"):
        find_candidates(1024, ["pbs_attn"])


@pytest.mark.parametrize("name", NAMES)
def test_a_uniform_recipe_uses_them_in_prefill_alone(model: Any, name: str) -> None:
    recipe = Recipe.uniform(model, name, dict(get(name).example))
    for layer in recipe.layers.values():
        assert [choice.mechanism for choice in layer.prefill] == [name]
        assert [choice.mechanism for choice in layer.decode] == ["dense"]
    ids = torch.arange(40)[None] % 50
    with apply(model, recipe, strict=True), torch.no_grad():
        model.generate(ids, max_new_tokens=3, do_sample=False)
        rows = explain(model).rows
    assert {(row.phase, row.mechanism, row.fallback) for row in rows} == {
        ("prefill", name, None),
        ("decode", "dense", None),
    }


def test_a_recipe_that_asks_for_it_in_decode_gets_dense_attention_and_the_reason(model: Any) -> None:
    uniform = Recipe.uniform(model, "pbs_attn", dict(get("pbs_attn").example))
    choices = (Choice("all", "pbs_attn", dict(get("pbs_attn").example)),)
    recipe = replace(uniform, layers=dict.fromkeys(uniform.layers, LayerRecipe(choices, choices)))
    ids = torch.arange(40)[None] % 50
    with apply(model, recipe), torch.no_grad():
        model.generate(ids, max_new_tokens=3, do_sample=False)
        reasons = [row.fallback for row in explain(model).rows if row.phase == "decode"]
    assert all(
        reason.startswith("1 queries and 42 keys: expected as many, pbs_attn is for prefill") for reason in reasons
    )


def test_queries_over_a_warm_cache_get_dense_attention_and_the_reason(model: Any) -> None:
    ids = torch.arange(40)[None] % 50
    with apply(model, Recipe.uniform(model, "minference", dict(get("minference").example))), torch.no_grad():
        first = model(ids[:, :24], use_cache=True)
        model(ids[:, 24:], past_key_values=first.past_key_values)
        reasons = {row.fallback for row in explain(model).rows if row.phase == "prefill"}
    assert len(reasons) == 1
    assert "16 queries and 40 keys: expected as many, minference is for prefill only" in str(reasons)


def test_a_card_cannot_claim_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_module, "_CARDS", dict(card_module._CARDS))
    facts = {"summary": "", "other_papers": ("A paper",), "supports": frozenset({"streaming"}), "prefill_only": "why"}
    with pytest.raises(ValueError, match="toy: supports='streaming': expected no such claim, it is for prefill only"):
        register("toy", Kind.SELECTOR, **facts)(type("Toy", (), {"__module__": "saccade.mechanisms.where.toy"}))
