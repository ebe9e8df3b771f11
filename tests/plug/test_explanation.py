"""`saccade.plug.explanation`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.dispatch import recording
from saccade.plug import Choice, LayerRecipe, Recipe, apply, explain

Build = Callable[..., Any]
NARROW = {"window": 6, "sinks": 2, "block": 8}


def test_says_what_is_installed_and_what_ran(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    base = Recipe.uniform(model, "dense")
    choices = (Choice((0, 1), "sink_window", NARROW), Choice((2, 3), "dense"))
    layer = LayerRecipe(choices, (Choice("all", "dense"),))
    with apply(model, Recipe(base.model, dict.fromkeys(base.layers, layer))), torch.no_grad():
        assert not any(row.ran for row in explain(model).rows)
        assert "not yet" in str(explain(model))
        model(ids)
        told = explain(model)
    windowed, dense, decode = told.rows[:3]
    assert (windowed.heads, windowed.mechanism, windowed.settings) == ((0, 1), "sink_window", NARROW)
    assert windowed.engine.startswith("block_attend:")
    pairs = sum(len({*range(max(i - 5, 0), i + 1), *range(min(2, i + 1))}) for i in range(40))
    assert windowed.density == pairs / 1600
    assert windowed.select_seconds > 0
    assert (windowed.queries, windowed.keys, windowed.fallback) == (40, 40, None)
    assert dense.engine.startswith("attend:")
    assert (decode.phase, decode.ran) == ("decode", False)
    assert "sink_window(window=6, sinks=2, block=8)" in str(told)
    assert json.loads(json.dumps(told.to_dict()))["rows"][0]["mechanism"] == "sink_window"
    assert str(explain(model)) == "LlamaForCausalLM: no recipe is applied; attention is 'sdpa'"


def test_keeps_nothing_when_told_so_and_passes_records_on(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    recipe = Recipe.uniform(model, "sink_window", NARROW)
    with apply(model, recipe, record=False), torch.no_grad():
        model(ids)
        assert not any(row.ran for row in explain(model).rows)
    with apply(model, recipe), recording() as seen, torch.no_grad():
        model(ids)
    assert [run.op for run in seen] == ["select", "block_attend"] * 2


@pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")
def test_says_which_instruction_set_the_cpp_engine_ran_on(tiny: Build, ids: Tensor) -> None:
    model = tiny().float()
    with apply(model, Recipe.uniform(model, "sink_window", NARROW)), torch.no_grad():
        model(ids)
        told = explain(model)
    assert told.rows[0].engine == f"block_attend:cpu ({cpu.instruction_set()})"
    assert f"cpu ({cpu.instruction_set()})" in str(told)
