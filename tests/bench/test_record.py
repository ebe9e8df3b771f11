"""Recording what a model's layers are given."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saccade.bench.record import record_layers, spread_layers


class Words:
    """A tokenizer that gives each character a number."""

    def __call__(self, text, **kwargs):
        return type("Encoded", (), {"input_ids": [ord(c) % 50 for c in text[:64]]})


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_layers_after_the_last_one_wanted_do_not_run(model):
    ran = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    seen = record_layers(model, Words(), 8, [0, 2])
    assert [tuple(x.q.shape) for x in seen] == [(1, 2, 8, 8)] * 2
    assert [tuple(x.k.shape) for x in seen] == [(1, 1, 8, 8)] * 2
    assert ran == [0, 1]


def test_the_model_is_as_before(model):
    ids = torch.arange(8)[None]
    before = model(ids).logits
    record_layers(model, Words(), 8, [1])
    assert torch.equal(model(ids).logits, before)


def test_layers_are_spread_from_first_to_last(model):
    assert spread_layers(model, 2) == [0, 3]
    assert spread_layers(model, 1) == [0]


def test_a_layer_that_does_not_exist_is_refused(model):
    with pytest.raises(ValueError, match=r"layer=4: expected 0 to 3"):
        record_layers(model, Words(), 8, [4])


def test_more_tokens_than_there_are_is_refused(model):
    with pytest.raises(ValueError, match=r"context=65: expected 2 to 64 tokens"):
        record_layers(model, Words(), 65, [0])
