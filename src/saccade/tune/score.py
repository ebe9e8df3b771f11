"""Scoring candidates on a layer's real queries, keys and values: damage, time and density."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from saccade.ops import attend, block_attend, gather_attend, recording
from saccade.ops.dispatch import density_of
from saccade.tune.candidates import DENSE, Candidate
from saccade.types import BlockLayout, Boxes, Geometry, TokenIndex
from saccade.types.layout_algebra import take_query_blocks

T = TypeVar("T")

FOCUS_SHARE = 0.5
"""Weight of the answer to a retrieval question against all other tokens of the calibration text."""

SAMPLED, SAMPLE_TOKENS = 4, 128
"""A candidate attends with one of `SAMPLED` stretches of at least `SAMPLE_TOKENS` queries, and its time is scaled up:
a damage is an average over queries, and so many tell it."""

PROBED, SLOWER = 2, 1.0
"""A candidate slower than this many times dense attention in all of the first layers is not scored in the others."""


@dataclass(frozen=True)
class CandidateScore:
    """One candidate on one layer.

    Args:
        seconds: Time of the layer's attention, choosing included.
        select_seconds: Time of choosing what to compute.
        density: Per head, kept pairs over causal pairs.
        errors: Per head, relative error of the attention output.
        damage: Per head, relative squared change of the residual stream.
        measured: False for the values of an earlier layer: see `hopeless`.
    """

    seconds: float
    select_seconds: float
    density: list[float]
    errors: list[float]
    damage: list[float]
    measured: bool = True

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> CandidateScore:
        """From a row of the state file."""
        return cls(**row)

    def to_json(self) -> dict[str, Any]:
        """For the state file."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What a layer's attention saw on the calibration text.

    Args:
        q: `[1, H, N, D]`.
        k: `[1, G, N, D]`.
        v: `[1, G, N, E]`.
        scale: Factor on q k^T.
        mixing: Output projection `[C, H * E]`, or None if the layer has none that we know of.
        residual: Norm of the residual stream that the output is added to, `[N]`, or None.
        focus: Bool `[N]`, tokens of a retrieval answer.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mixing: Tensor | None
    residual: Tensor | None
    focus: Tensor


def hopeless(history: Sequence[list[CandidateScore]]) -> dict[int, CandidateScore]:
    """Candidates that were clearly slower than dense attention in every layer so far, with their last scores.

    They are chosen only where they are faster, a few layers tell that they are not, and scoring them takes longest.

    Args:
        history: Scores of the layers before, dense attention first.

    Returns:
        By place among the scores.
    """
    if len(history) < PROBED:
        return {}
    slow = [
        place
        for place in range(1, len(history[0]))
        if all(layer[place].seconds > SLOWER * layer[0].seconds for layer in history)
    ]
    return {place: replace(history[-1][place], measured=False) for place in slow}


def score_layer(
    inputs: LayerInputs, candidates: list[Candidate], history: Sequence[list[CandidateScore]] = (), repeats: int = 1
) -> list[CandidateScore]:
    """Score dense attention (first) and every candidate not `hopeless`; times are the least of `repeats`."""
    heads = inputs.q.shape[1]
    dense, seconds = _timed(lambda: attend(*_qkv(inputs), causal=True, scale=inputs.scale), repeats)
    scores = [CandidateScore(seconds, 0.0, [1.0] * heads, [0.0] * heads, [0.0] * heads)]
    skipped = hopeless(history)
    for place, candidate in enumerate(candidates, 1):
        scores.append(skipped[place] if place in skipped else _score(inputs, candidate, dense, repeats))
    return scores


def _score(inputs: LayerInputs, candidate: Candidate, dense: Tensor, repeats: int) -> CandidateScore:
    mechanism = None if candidate.mechanism == DENSE else candidate.build()
    if mechanism is None or mechanism.adds:
        return _score_whole(inputs, candidate, dense, repeats)
    (q, k, v), rounding = _timed(lambda: candidate.round(*_qkv(inputs)), repeats)
    chosen, select = _timed(lambda: mechanism.pattern(q, k, Geometry(causal=True)), repeats)
    engine: Any = block_attend if isinstance(chosen, BlockLayout) else gather_attend
    part, tokens, work = sample(chosen)
    out, seconds = _timed(lambda: engine(q[:, :, tokens], k, v, part, scale=inputs.scale), repeats)
    some = replace(
        inputs, focus=inputs.focus[tokens], residual=None if inputs.residual is None else inputs.residual[tokens]
    )
    errors, damage = compare_outputs(out, dense[:, :, tokens], some)
    whole = rounding + select + work * seconds
    return CandidateScore(whole, select, _densities(chosen, inputs.q.shape[1]), errors, damage)


def _score_whole(inputs: LayerInputs, candidate: Candidate, dense: Tensor, repeats: int) -> CandidateScore:
    """The score of one whose output is not attention over a pattern that it selects, from calls as they are."""
    attention = candidate.attention()
    with recording() as records:
        out, seconds = _timed(lambda: attention(*_qkv(inputs), inputs.scale), repeats)
    errors, damage = compare_outputs(out, dense, inputs)
    tokens, heads = inputs.q.shape[2], inputs.q.shape[1]
    computed = (density_of(records) or 0.0) / repeats * 2 * tokens / (tokens + 1)
    density = 1.0 if candidate.mechanism == DENSE else computed
    select = sum(run.select_seconds for run in records) / repeats
    return CandidateScore(seconds, select, [density] * heads, errors, damage)


def sample(chosen: BlockLayout | TokenIndex | Boxes) -> tuple[BlockLayout | TokenIndex | Boxes, Tensor | slice, float]:
    """A part of the queries of a pattern: every fourth stretch of them, the last one, which is asked, included.

    Args:
        chosen: The pattern of all queries. Only a layout of blocks can be cut; others are taken whole.

    Returns:
        The pattern of the part, the queries that are in it, and how many times its work the whole one is.
    """
    if not isinstance(chosen, BlockLayout):
        return chosen, slice(None), 1.0
    height = chosen.block[0]
    stretch = math.lcm(SAMPLE_TOKENS, height) // height
    place = torch.arange(chosen.query_blocks, device=chosen.device) // stretch
    blocks = ((place[-1] - place) % SAMPLED == 0).nonzero()[:, 0]
    part = take_query_blocks(chosen, blocks)
    tokens = (blocks[:, None] * height + torch.arange(height, device=chosen.device)).flatten()
    return part, tokens[tokens < chosen.queries], len(chosen.indices) / max(len(part.indices), 1)


def _densities(chosen: BlockLayout | TokenIndex | Boxes, heads: int) -> list[float]:
    """Kept pairs over causal pairs of every head, fp64."""
    if isinstance(chosen, BlockLayout):
        return chosen.density_per_head(causal=True).mean(0).expand(heads).tolist()
    causal = BlockLayout.window(chosen.queries, chosen.keys, -1, 0).density()
    return [chosen.density() / causal] * heads


def _qkv(inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.q, inputs.k, inputs.v


def _timed(run: Callable[[], T], repeats: int) -> tuple[T, float]:
    """What it gives, and the least seconds it took."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - started)
    return result, best


def compare_outputs(out: Tensor, dense: Tensor, inputs: LayerInputs) -> tuple[list[float], list[float]]:
    """Per head: relative output error, and damage to the residual stream (mean over tokens, answers weighted up)."""
    change = (out - dense)[0].float()
    errors = change.flatten(1).norm(dim=1) / dense[0].float().flatten(1).norm(dim=1).clamp(min=1e-12)
    if inputs.mixing is None or inputs.residual is None:
        relative = change.square().sum(-1) / dense[0].float().square().sum((0, -1)).clamp(min=1e-12)
    else:
        heads, value_dim = change.shape[0], change.shape[2]
        mixing = inputs.mixing.float().unflatten(1, (heads, value_dim)).transpose(0, 1)
        gram = mixing.transpose(1, 2) @ mixing
        relative = ((change @ gram) * change).sum(-1) / inputs.residual.float().square().clamp(min=1e-12)
    damage = relative.mean(1)
    if bool(inputs.focus.any()):
        damage = (1 - FOCUS_SHARE) * damage + FOCUS_SHARE * relative[:, inputs.focus].mean(1)
    return errors.tolist(), damage.tolist()


__all__ = ["DENSE", "CandidateScore", "LayerInputs", "compare_outputs", "score_layer"]
