"""The attention layers of a transformers model: modules that call the library's attention interface."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""Name under which transformers' model files hold the interface that an attention module calls."""


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules by name, in the model's order; empty for a model that does not use the interface."""
    return {name: module for name, module in model.named_modules() if calls_interface(module)}


def calls_interface(module: nn.Module) -> bool:
    """Whether the module's own `forward` looks its attention function up in transformers' interface."""
    code = getattr(_forward(module), "__code__", None)
    return code is not None and INTERFACE in code.co_names and hasattr(module, "config")


def forward_globals(module: nn.Module) -> dict[str, Any]:
    """Global names of the file that defines the module's `forward`."""
    return getattr(_forward(module), "__globals__", {})


def _forward(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)
