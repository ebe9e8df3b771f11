"""The cache that a tuned model gets."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch

from saccade.kernels import cpu
from saccade.plug import LayerCache
from saccade.tune.caches import exact_cache
from saccade.tune.candidates import DENSE, Candidate

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
