"""Watching what attention layers run on."""

from __future__ import annotations

import pytest
import torch

from saccade.plug import Recipe, apply, attention_layers, watch

pytestmark = pytest.mark.quick


def test_every_layer_is_seen_and_nothing_changes(tiny, ids):
    model = tiny()
    before = model(ids).logits
    seen = []
    with watch(model, seen.append):
        during = model(ids).logits
    assert torch.equal(during, before)
    assert torch.equal(model(ids).logits, before)
    assert [observation.layer for observation in seen] == list(attention_layers(model))
    assert seen[0].q.shape == (2, 4, 40, 8)
    assert seen[0].k.shape == seen[0].v.shape == (2, 2, 40, 8)
    assert seen[0].scale == pytest.approx(8**-0.5)


def test_what_is_seen_gives_the_layers_output(tiny, ids):
    model = tiny()
    seen, outputs = [], []
    layer = model.model.layers[0].self_attn
    hook = layer.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    with watch(model, seen.append):
        model(ids)
    hook.remove()
    first = seen[0]
    k, v = (x.repeat_interleave(2, 1) for x in (first.k, first.v))
    out = torch.nn.functional.scaled_dot_product_attention(first.q, k, v, is_causal=True, scale=first.scale)
    torch.testing.assert_close(outputs[0], out.transpose(1, 2).flatten(2))


def test_an_applied_recipe_is_refused(tiny):
    model = tiny()
    refused = pytest.raises(ValueError, match="a recipe is applied already")
    with apply(model, Recipe.uniform(model, "dense")), refused, watch(model, print):
        pass


def test_layers_can_run_a_recipe_while_they_are_watched(tiny, ids):
    model = tiny()
    window = Recipe.uniform(model, "sink_window", {"window": 4, "sinks": 0, "block": 4})
    with apply(model, window):
        wanted = model(ids).logits
    seen = []
    with watch(model, seen.append, window):
        assert torch.equal(model(ids).logits, wanted)
    assert [observation.layer for observation in seen] == list(attention_layers(model))
