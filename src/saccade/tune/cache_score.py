"""Scoring caches on a layer's real queries, keys and values: bytes held, damage, and the time of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saccade.mechanisms.cache.base import CachePolicy, Step, attend_chosen, evict_after
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.ops import attend
from saccade.tune.caches import CacheCandidate
from saccade.tune.score import LayerInputs, compare_outputs

STEPS = 3
"""Decoded tokens that are timed; the fastest counts."""


@dataclass(frozen=True)
class CacheScore:
    """One cache on one layer.

    Args:
        share: Bytes held after the prompt, over those of keys and values alone as they come.
        damage: Relative squared change of the residual stream at the tokens after the prompt, summed over heads.
        seconds: Of one decoded token: taken in, attended, evicted.
        dense_seconds: Of the same token with PyTorch's attention over keys and values that it is appended to.
        refused: Why the layer cannot have it, "" if it can.
    """

    share: float
    damage: float
    seconds: float
    dense_seconds: float
    refused: str = ""

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> CacheScore:
        """From a row of the state file."""
        return cls(**row)

    def to_json(self) -> dict[str, Any]:
        """For the state file."""
        return asdict(self)


def tail_length(tokens: int) -> int:
    """Last tokens of a prompt that are read after the cache was cut, the question among them: at most 256."""
    return min(256, tokens // 4)


@torch.no_grad()
def score_caches(
    inputs: LayerInputs, candidates: list[CacheCandidate], layer: int, layers: int,
    skipped: Mapping[int, str] | None = None,
) -> list[CacheScore]:  # fmt: skip
    """Let each cache keep what it would of all tokens but the tail, and attend from the tail.

    Args:
        inputs: Of the layer.
        candidates: Caches.
        layer: Which layer it is, from 0.
        layers: How many there are.
        skipped: Places of candidates that are not to be scored, with the reasons.

    Returns:
        A score for each.
    """
    skipped, tail = {} if skipped is None else skipped, tail_length(inputs.q.shape[2])
    q, k, v = inputs.q, inputs.k, inputs.v
    dense = attend(q[:, :, -tail:], k, v, causal=True, scale=inputs.scale)
    policies = {place: candidate.cache.build() for place, candidate in enumerate(candidates) if place not in skipped}
    lse, known = None, (q[:, :, :-tail], dict[Storage, Tensor]())
    if any(policy.needs_lse for policy in policies.values()):
        first = (x[:, :, :-tail] for x in (q, k, v))
        lse = attend(*first, causal=True, scale=inputs.scale, return_lse=True).lse
    last = replace(
        inputs, q=q[:, :, -tail:], focus=inputs.focus[-tail:],
        residual=None if inputs.residual is None else inputs.residual[-tail:],
    )  # fmt: skip
    plain = (k.nbytes + v.nbytes) * (k.shape[2] - tail) / k.shape[2]
    dense_seconds = _least(partial(_dense_step, inputs))

    def score(policy: CachePolicy) -> CacheScore:
        step, store = Step(layer, layers, inputs.scale, lse if policy.needs_lse else None), policy.store()
        store.append(k[:, :, :-tail], v[:, :, :-tail])
        step.known = known
        evict_after(policy, known[0], store, step)
        step.known = None
        share = store.nbytes / plain
        store.append(k[:, :, -tail:], v[:, :, -tail:])
        out = attend_chosen(last.q, store, None, scale=inputs.scale).out
        damage = sum(compare_outputs(out, dense, last)[1])
        return CacheScore(share, damage, _least(partial(_cached_step, policy, store, step, inputs)), dense_seconds)

    scores = []
    for place in range(len(candidates)):
        if place in skipped:
            scores.append(CacheScore(1.0, 0.0, 0.0, dense_seconds, skipped[place]))
            continue
        try:
            scores.append(score(policies[place]))
        except ValueError as error:  # codes whose groups do not divide the channels, for one
            scores.append(CacheScore(1.0, 0.0, 0.0, dense_seconds, str(error)))
    return scores


def _cached_step(policy: CachePolicy, store: KVStore, step: Step, inputs: LayerInputs) -> None:
    """One decoded token: the last one again."""
    q = inputs.q[:, :, -1:]
    store.append(inputs.k[:, :, -1:], inputs.v[:, :, -1:])
    _, step.lse = attend_chosen(q, store, policy.read(q, store, step), scale=inputs.scale)
    evict_after(policy, q, store, step)


def _dense_step(inputs: LayerInputs) -> Tensor:
    """The same in PyTorch, with a cache that is appended to."""
    k, v = (torch.cat([x, x[:, :, -1:]], 2) for x in (inputs.k, inputs.v))
    return scaled_dot_product_attention(inputs.q[:, :, -1:], k, v, scale=inputs.scale, enable_gqa=True)


def _least(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(STEPS):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


__all__ = ["CacheScore", "score_caches", "tail_length"]
