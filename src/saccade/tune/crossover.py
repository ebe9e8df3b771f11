"""From which length on a candidate is faster than dense attention, on a layer's real queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.bench.measure import interleaved
from saccade.models.tasks import last_hidden_states
from saccade.ops import attend
from saccade.plug import Observation, Recipe, attention_layers, watch
from saccade.tune.candidates import Candidate

SHORTEST = 256
ROUNDS = 3


def lengths_to_try(context: int) -> list[int]:
    """Halvings of the context, longest first, down to `SHORTEST`."""
    lengths = [context // 2]
    while lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    return lengths


def crossover_lengths(
    model: Any, ids: Tensor, candidates: list[Candidate], context: int, exact: Recipe
) -> dict[str, int]:
    """For each candidate (by key) the shortest length tried from which it is faster than dense attention.

    The scoring has shown each to be faster at `context` itself; shorter prefixes of the middle layer's queries and keys
    are tried down from there, and a candidate leaves the race at the first length where dense wins.

    Args:
        model: The model.
        ids: Token ids `[context]`.
        candidates: Candidates in use.
        context: Tokens they were scored at.
        exact: Dense attention, as the model runs meanwhile.

    Returns:
        Tokens by the candidates' keys.
    """
    found = {candidate.key: context for candidate in candidates}
    if not candidates:
        return found
    layers = list(attention_layers(model))
    middle = layers[len(layers) // 2]
    seen: list[Observation] = []

    def observe(observation: Observation) -> None:
        if observation.layer == middle:
            seen.append(observation)

    with torch.no_grad(), watch(model, observe, exact):
        last_hidden_states(model, ids[: context // 2])
        racing = {candidate.key: candidate.attention() for candidate in candidates}
        for length in lengths_to_try(context):
            racing = _faster(seen[0], racing, length)
            found |= dict.fromkeys(racing, length)
    return found


def _faster(seen: Observation, racing: dict[str, Any], length: int) -> dict[str, Any]:
    """Those still faster than dense attention on the first `length` tokens."""
    q, k, v = (x[:, :, :length] for x in (seen.q, seen.k, seen.v))
    calls: dict[str, Any] = {"dense": lambda: attend(q, k, v, causal=True, scale=seen.scale)}
    for key, attention in racing.items():
        calls[key] = lambda run=attention: run(q, k, v, seen.scale)
    times = {key: min(seconds) for key, seconds in interleaved(calls, ROUNDS, device=str(q.device)).items()}
    return {key: attention for key, attention in racing.items() if times[key] < times["dense"]}
