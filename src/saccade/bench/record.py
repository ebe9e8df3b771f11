"""Real queries, keys and values: those of one layer of a language model on the built-in text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.models.tasks import last_hidden_states
from saccade.models.text import builtin_text
from saccade.plug import Observation, attention_layers, watch


def record_layer(model: Any, tokenizer: Any, context: int, layer: int) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """What one attention layer is given on the first tokens of the built-in text.

    Args:
        model: A transformers language model in eval mode.
        tokenizer: Its tokenizer.
        context: N, tokens of the prompt.
        layer: Number of the attention layer, from 0.

    Returns:
        q `[1, H, N, D]`, k and v `[1, G, N, D]` in the model's dtype, and the layer's scale (None means D^-0.5).

    Raises:
        ValueError: If the layer does not exist or the text is shorter than `context`.
    """
    names = list(attention_layers(model))
    if not 0 <= layer < len(names):
        raise ValueError(f"layer={layer}: expected 0 to {len(names) - 1}")
    ids = torch.tensor(tokenizer(builtin_text(), add_special_tokens=False).input_ids)
    if not 2 <= context <= len(ids):
        raise ValueError(f"context={context}: expected 2 to {len(ids)} tokens, the built-in text's")
    seen: list[Observation] = []

    def observe(observation: Observation) -> None:
        if observation.layer == names[layer]:
            seen.append(observation)

    with torch.no_grad(), watch(model, observe):
        last_hidden_states(model, ids[:context])
    return seen[0].q, seen[0].k, seen[0].v, seen[0].scale
