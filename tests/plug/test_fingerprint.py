"""`saccade.plug.fingerprint`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from saccade.plug import Recipe, apply, fingerprint

pytestmark = pytest.mark.quick

Build = Callable[..., Any]


def test_is_the_same_for_the_same_model_applied_or_not(tiny: Build) -> None:
    model = tiny()
    before = fingerprint(model)
    assert (before.layers, before.heads, before.kv_heads, before.head_dim, before.hidden_size) == (2, 4, 2, 8, 32)
    assert fingerprint(tiny()) == before
    with apply(model, Recipe.uniform(model, "sink_window")):
        assert fingerprint(model) == before
    assert fingerprint(model) == before


def test_survives_a_change_to_bfloat16_but_not_of_weights(tiny: Build) -> None:
    model = tiny(dtype=torch.float32)
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    assert before.differences(fingerprint(model)).startswith("weights=")
    assert fingerprint(tiny(dtype=torch.float32).to(torch.bfloat16)) == before


def test_models_without_a_config_or_weights_are_refused(tiny: Build) -> None:
    with pytest.raises(ValueError, match="model of type Linear: expected a transformers model with a config"):
        fingerprint(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is on the meta device, expected loaded weights"):
        fingerprint(tiny().to("meta"))
