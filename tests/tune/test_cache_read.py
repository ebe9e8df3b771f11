"""The end of a prompt over what was kept of its beginning."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch

from saccade.mechanisms.cache.base import Everything
from saccade.mechanisms.cache.snapkv import SnapKV
from saccade.models.passkey import passkey_likelihoods, passkey_prompts
from saccade.plug import PagedCache, Recipe, apply
from saccade.plug.cache import cache_bytes
from saccade.tune.cache_read import read_tail, tail_answers, tail_nll
from saccade.tune.cache_score import tail_length


@pytest.fixture(scope="module")
def prompt(byte_model):
    return passkey_prompts(byte_model[1], (512,), (0.5,), haystack="one two three. " * 60)[0]


def test_a_tail_in_pieces_is_the_text_read_at_once(byte_model, prompt):
    model, tokenizer = byte_model
    (whole,) = passkey_likelihoods(model, tokenizer, [prompt])
    (mine,) = tail_answers(model, tokenizer, [prompt])
    assert mine.log_prob == pytest.approx(whole.log_prob, abs=1e-4)
    assert mine.found == whole.found
    answer = torch.tensor([tokenizer(" " + prompt.answer, add_special_tokens=False).input_ids])
    ids = torch.cat([prompt.ids, answer], 1)
    tail = tail_length(ids.shape[1])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert mine.nll == pytest.approx(float(losses[-tail:].mean()), abs=1e-4)
    assert mine.nbytes == 2 * 2 * 2 * 8 * 4 * ids.shape[1]
    assert mine.likelihood(text=False).nll is None
    assert mine.likelihood(text=True).nll == mine.nll


def test_pages_that_keep_everything_change_nothing(byte_model, prompt):
    model, tokenizer = byte_model
    (dense,) = tail_answers(model, tokenizer, [prompt])
    with apply(model, Recipe.uniform(model, "dense")):
        (paged,) = tail_answers(model, tokenizer, [prompt], lambda: PagedCache(model, Everything()))
    assert paged[:3] == pytest.approx(dense[:3], abs=1e-4)


def test_what_was_evicted_is_missed_by_the_tail(byte_model, prompt):
    model, tokenizer = byte_model
    ids, policy = prompt.ids[0], SnapKV(tokens=32, window=8)
    tail = tail_length(len(ids))
    with apply(model, Recipe.uniform(model, "dense")):
        hidden, cache = read_tail(model, ids, tail, PagedCache(model, policy))
        whole, _ = read_tail(model, ids, tail, PagedCache(model, Everything()))
    assert [int(layer.store.lengths.max()) for layer in cache.layers] == [32 + tail] * 2
    assert hidden.shape == (tail, 32)
    assert torch.equal(hidden[0], whole[0])  # predicted by the last token before the cut
    assert not torch.allclose(hidden[-1], whole[-1], atol=1e-5)
    assert tail_nll(model, hidden, ids[-tail:]) != tail_nll(model, whole, ids[-tail:])
    assert cache_bytes(cache) < 2 * 2 * 2 * 8 * 4 * len(ids)
