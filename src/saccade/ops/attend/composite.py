"""`attend` with what an operator cannot take: a `score_mod`, a `normalise`, dropout. Plain differentiable torch.

The same chunks of queries as `eager`; each is recomputed in the backward, so memory stays bounded there too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.ops.attend.band import Chunk, chunk_mask
from saccade.ops.attend.eager import Rules, bias_slice, fold, plan, sloped
from saccade.ops.attend.operator import bad_tokens, is_finite, without
from saccade.ops.checks import accumulation_dtype


@dataclass(frozen=True)
class Callbacks:
    """The user's functions, see `attend`."""

    score_mod: Callable[..., Tensor] | None
    normalise: Callable[[Tensor, Tensor], Tensor] | None
    dropout: float


def run(q: Tensor, k: Tensor, v: Tensor, rules: Rules, callbacks: Callbacks) -> tuple[Tensor, Tensor]:
    """`out` `[B, H, M, E]` and `lse` `[B, H, M]` (meaningless with `normalise`)."""
    bad: Tensor | None = None
    if torch.compiler.is_compiling() or not all(is_finite(x.detach()) for x in (q, k, v)):
        bad = bad_tokens(k.detach(), v.detach())
        k, v = without(k, bad), without(v, bad)
    chunks = list(plan(q, k, rules))
    if callbacks.normalise is not None:
        chunks = [chunk._replace(low=0) for chunk in chunks]  # whole rows: keys keep their place
    again = torch.is_grad_enabled() and len(chunks) > 1 and not torch.compiler.is_compiling()
    parts = []
    for chunk in chunks:
        if again:
            parts.append(checkpoint(_chunk, q, k, v, bad, chunk, rules, callbacks, use_reentrant=False))
        else:
            parts.append(_chunk(q, k, v, bad, chunk, rules, callbacks))
    parts = parts or [_nothing(q, v.shape[3], 0, rules.sinks)]
    return torch.cat([part[0] for part in parts], 2).to(q.dtype), torch.cat([part[1] for part in parts], 2)


def _nothing(q: Tensor, dim: int, rows: int, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Results of rows that see nothing, still part of the graph."""
    dtype = accumulation_dtype(q.dtype)
    lse = q.new_full((*q.shape[:2], rows), -torch.inf, dtype=dtype) + q[:, :, :0].sum(dtype=dtype)
    lse = lse if sinks is None else torch.logaddexp(lse, sinks.to(dtype)[:, None])
    return q.new_zeros(*q.shape[:2], rows, dim, dtype=dtype) + q[:, :, :0].sum(dtype=dtype), lse


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, bad: Tensor | None, chunk: Chunk, rules: Rules, callbacks: Callbacks
) -> tuple[Tensor, Tensor]:
    """One chunk's `out` `[B, H, m, E]` and `lse` `[B, H, m]`, in the accumulation dtype."""
    dtype = accumulation_dtype(q.dtype)
    (batch, heads, total, _), groups, length = q.shape, k.shape[1], k.shape[2]
    start, stop, low, high = chunk
    if low == high:
        return _nothing(q, v.shape[3], stop - start, rules.sinks)
    keys, values = k[:, :, low:high].to(dtype), v[:, :, low:high].to(dtype)
    mask = chunk_mask(chunk, total, length, rules.left, rules.right, rules.q_segments, rules.kv_segments, q.device)
    if rules.bias is not None:
        shown = bias_slice(rules.bias.detach(), chunk) > -torch.inf
        mask = shown if mask is None else mask & shown
    mask = torch.ones((), dtype=torch.bool, device=q.device).expand(1, 1, 1, high - low) if mask is None else mask
    rows = q[:, :, start:stop]
    rows = rows if bad is None else rows.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # queries of padding
    scores = torch.matmul(fold(rows, groups, dtype) * rules.scale, keys.mT)
    scores = scores.view(batch, heads, stop - start, high - low)
    scores = _modified(scores, chunk, rules, (total, length), callbacks.score_mod)
    weights, lse = _weights(scores, mask, rules.sinks, callbacks.normalise)
    weights = torch.nn.functional.dropout(weights, callbacks.dropout) if callbacks.dropout else weights
    out = torch.matmul(weights.reshape(batch, groups, heads // groups * (stop - start), high - low), values)
    out = out.view(batch, heads, stop - start, v.shape[3])
    if bad is None:
        return out, lse
    seen = mask.expand(batch, -1, -1, -1) & bad[:, :, None, low:high].repeat_interleave(heads // groups, 1)
    return out.masked_fill(seen.any(-1, keepdim=True), torch.nan), lse.masked_fill(seen.any(-1), torch.nan)


def _modified(
    scores: Tensor, chunk: Chunk, rules: Rules, sizes: tuple[int, int], score_mod: Callable[..., Tensor] | None
) -> Tensor:
    """Softcap, ALiBi, bias and `score_mod` on scaled scores `[B, H, m, n]`."""
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if rules.alibi is not None:
        scores = sloped(scores, rules.alibi, chunk, *sizes)
    if rules.bias is not None:
        bias = bias_slice(rules.bias, chunk).to(scores.dtype)
        scores = scores + bias.masked_fill(bias == -torch.inf, 0.0)  # hidden by the mask instead
    if score_mod is None:
        return scores
    places = [torch.arange(size, device=scores.device) for size in scores.shape[:2]]
    places += [torch.arange(first, last, device=scores.device) for first, last in (chunk[:2], chunk[2:])]
    shapes = ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,))
    return score_mod(scores, *(place.view(shape) for place, shape in zip(places, shapes, strict=True)))


def _weights(
    scores: Tensor, mask: Tensor, sinks: Tensor | None, normalise: Callable[[Tensor, Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Weights `[B, H, m, n]` and LSE `[B, H, m]`."""
    if normalise is not None:
        weights = normalise(scores.masked_fill(~mask, 0.0), mask).to(scores.dtype)
        return weights.masked_fill(~mask, 0.0), scores.new_zeros(scores.shape[:3])
    hidden = scores.masked_fill(~mask, -torch.inf)
    top = hidden.detach().amax(-1)
    top = top if sinks is None else torch.maximum(top, sinks.detach().to(top.dtype)[:, None])
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(hidden - top[..., None])
    mass = weights.sum(-1)
    mass = mass if sinks is None else mass + torch.exp(sinks.to(mass.dtype)[:, None] - top)
    empty = mass == 0
    lse = (mass.masked_fill(empty, 1.0).log() + top).masked_fill(empty, -torch.inf)
    return weights / mass.masked_fill(empty, 1.0)[..., None], lse


__all__ = ["Callbacks", "run"]
