"""The cache that a tuned model gets."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch

from saccade.catalog import cards
from saccade.kernels import cpu
from saccade.mechanisms.cache.storage import FORMS, Storage
from saccade.plug import LayerCache, PolicyChoice
from saccade.tune.caches import combined, exact_cache, find_cache_candidates
from saccade.tune.candidates import DENSE, Candidate
from saccade.types import Kind

needs_kernel = pytest.mark.skipif(cpu.missing() is not None, reason="the C++ engine is not there")


@needs_kernel
def test_the_exact_cache_is_had_where_decoding_has_a_kernel(byte_model):
    assert exact_cache(byte_model[0], Candidate(DENSE)) == (LayerCache(), "")


def test_without_a_kernel_there_is_none(byte_model):
    model = byte_model[0].double()
    try:
        cache, reason = exact_cache(model, Candidate(DENSE))
    finally:
        model.float()
    assert cache is None
    assert reason.startswith("decoding from pages has no kernel here: ")


@needs_kernel
def test_a_model_that_says_otherwise_with_pages_gets_none(byte_model, monkeypatch):
    model = byte_model[0]
    monkeypatch.setattr("saccade.plug.cached.attend_chosen", lambda q, *_, **__: (torch.full_like(q, 9.0), None))
    assert exact_cache(model, Candidate(DENSE)) == (None, "the model's logits are others with a PagedCache")


@needs_kernel
def test_a_model_that_refuses_pages_says_why(byte_model, monkeypatch):
    def refuse(*_):
        raise ValueError("no pages")

    monkeypatch.setattr("saccade.plug.Recipe.make_cache", refuse)
    assert exact_cache(byte_model[0], Candidate(DENSE)) == (None, "the model cannot use a PagedCache: no pages")
    ids = torch.arange(1, 5)[None]
    assert byte_model[0](ids).logits.isfinite().all()  # and the recipe is gone


def test_candidates_come_from_the_registry():
    candidates, left_out = find_cache_candidates(2048)
    assert candidates[0].cache == LayerCache()
    policies = {card.name: card for card in cards() if card.kind is Kind.CACHE_POLICY}
    used = {part.policy for c in candidates for part in (c.cache.keep, c.cache.store) if isinstance(part, PolicyChoice)}
    assert used | set(left_out) == set(policies)
    assert used.isdisjoint(left_out)
    assert all(policies[name].effects & {"evicting", "packing"} for name in used)
    assert left_out["quest"] == "selecting: holds as many bytes as dense attention does"
    assert len({c.key for c in candidates}) == len({c.label for c in candidates}) == len(candidates)
    assert [c.cache.store for c in candidates if isinstance(c.cache.store, Storage)] == list(FORMS)


def test_each_evicting_candidate_is_combined_with_each_storage():
    candidates, _ = find_cache_candidates(2048)
    evicting = sum(c.cache.keep is not None for c in candidates)
    options = combined(candidates)
    assert len(options) == len(candidates) + evicting * len(FORMS)
    for cache, places in options:
        parts = [candidates[place].cache for place in places]
        assert cache.keep == parts[0].keep
        assert cache.store == parts[-1].store
        cache.build()
