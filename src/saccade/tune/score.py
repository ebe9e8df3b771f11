"""Scoring candidates on a layer's real queries, keys and values: damage, time and density."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from saccade.ops import attend, recording
from saccade.tune.candidates import DENSE, Candidate
from saccade.types import Geometry

FOCUS_SHARE = 0.5
"""Weight of the answer to a retrieval question against all other tokens of the calibration text."""


@dataclass(frozen=True)
class CandidateScore:
    """One candidate on one layer.

    Args:
        seconds: Time of the layer's attention, choosing included.
        select_seconds: Time of choosing what to compute.
        density: Kept pairs over causal pairs.
        errors: Per head, relative error of the attention output.
        damage: Per head, relative squared change of the residual stream.
    """

    seconds: float
    select_seconds: float
    density: float
    errors: list[float]
    damage: list[float]

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


def score_layer(inputs: LayerInputs, candidates: list[Candidate], repeats: int = 1) -> list[CandidateScore]:
    """Score dense attention (first) and every candidate; times are the least of `repeats`."""
    geometry = Geometry(causal=True)
    dense, dense_seconds, _, _ = _timed(lambda: attend(*_qkv(inputs), causal=True, scale=inputs.scale), repeats)
    heads = inputs.q.shape[1]
    scores = [CandidateScore(dense_seconds, 0.0, 1.0, [0.0] * heads, [0.0] * heads)]
    for candidate in candidates:
        mechanism = candidate.build()
        out, seconds, select, density = _timed(
            lambda: mechanism(*_qkv(inputs), geometry=geometry, scale=inputs.scale),  # noqa: B023
            repeats,
        )
        errors, damage = compare_outputs(out, dense, inputs)
        scores.append(CandidateScore(seconds, select, density * _causal_share(inputs), errors, damage))
    return scores


def _qkv(inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.q, inputs.k, inputs.v


def _causal_share(inputs: LayerInputs) -> float:
    """All pairs over causal pairs."""
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    return queries * keys / max(queries * (keys - queries) + queries * (queries + 1) // 2, 1)


def _timed(run: Any, repeats: int) -> tuple[Tensor, float, float, float]:
    """Output, least seconds, its selection seconds, and density of M x N."""
    best, select, density = float("inf"), 0.0, 1.0
    for _ in range(repeats):
        with recording() as records:
            started = time.perf_counter()
            out = run()
            seconds = time.perf_counter() - started
        if seconds < best:
            best, select = seconds, sum(record.select_seconds for record in records)
        known = [record.density for record in records if record.density is not None]
        density = known[0] if known else 1.0
    return out, best, select, density


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
