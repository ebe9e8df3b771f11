"""Real queries, keys and values: those of a language model's layers on the built-in text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from saccade.models.tasks import last_hidden_states
from saccade.models.text import builtin_text
from saccade.plug import Observation, attention_layers, watch


class _SeenAll(Exception):  # noqa: N818  no error: it ends a pass whose other layers nobody asked for
    """All layers that were wanted have been seen."""


def record_layers(model: Any, tokenizer: Any, context: int, layers: Sequence[int]) -> list[Observation]:
    """What some attention layers are given on the first tokens of the built-in text.

    Args:
        model: A transformers language model in eval mode.
        tokenizer: Its tokenizer.
        context: N, tokens of the prompt.
        layers: Numbers of the attention layers, from 0, ascending.

    Returns:
        For each its q `[1, H, N, D]`, k and v `[1, G, N, D]` in the model's dtype, and its scale (None means D^-0.5).

    Raises:
        ValueError: If a layer does not exist or the text is shorter than `context`.
    """
    names = list(attention_layers(model))
    for layer in layers:
        if not 0 <= layer < len(names):
            raise ValueError(f"layer={layer}: expected 0 to {len(names) - 1}")
    ids = torch.tensor(tokenizer(builtin_text(), add_special_tokens=False).input_ids)
    if not 2 <= context <= len(ids):
        raise ValueError(f"context={context}: expected 2 to {len(ids)} tokens, the built-in text's")
    wanted, seen = {names[layer] for layer in layers}, list[Observation]()

    def observe(observation: Observation) -> None:
        if observation.layer in wanted:
            seen.append(observation)
            if len(seen) == len(wanted):
                raise _SeenAll

    with suppress(_SeenAll), torch.no_grad(), watch(model, observe):
        last_hidden_states(model, ids[:context])
    return seen


def spread_layers(model: Any, count: int) -> list[int]:
    """Numbers of at most `count` attention layers, evenly spread from the first to the last."""
    last = len(attention_layers(model)) - 1
    return sorted({round(place * last / max(count - 1, 1)) for place in range(count)})
