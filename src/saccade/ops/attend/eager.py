"""The portable implementation: chunks of queries within a bounded workspace, never a resident M x N.

Query heads that share a key/value head are stacked in the query axis, so keys and values are never repeated. Per row,
with scores s (scaled, capped, biased, -inf where hidden) and a sink logit z if there is one:

    lse = log(sum_j exp(s_j) + exp(z))        p = exp(s - lse)        out = p v
    ds = p * (dp - sum_j p_j dp_j + dlse)     dp = grad_out v^T       dz = -exp(z - lse) (sum_j p_j dp_j - dlse)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.ops.attend.band import Chunk, chunk_mask, chunk_rows, chunks, segment_span
from saccade.ops.checks import accumulation_dtype

BUFFERS = 4
"""Score-sized temporaries alive at once, the backward's."""

CPU_CACHE = 8 * 2**20
CPU_ROWS = 64
"""On CPUs chunks that stay in cache are faster, as long as enough queries share each pass over the keys."""


@dataclass(frozen=True)
class Rules:
    """What fixes the scores beside q and k; `left`, `right` as in `band`, bias `[B or 1, H or 1, M or 1, N or 1]`."""

    left: int
    right: int
    softcap: float | None
    scale: float
    workspace: int
    bias: Tensor | None = None
    sinks: Tensor | None = None
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    alibi: Tensor | None = None
    careful: bool = False
    """Whether keys may be NaN or inf where `bias` hides them."""


def plan(q: Tensor, k: Tensor, rules: Rules) -> Iterator[Chunk]:
    """The chunks of queries, and of each the keys to visit."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    span = keys if rules.left < 0 or rules.right < 0 else min(keys, 2 * (rules.left + rules.right + 1) + 64)
    row_bytes = BUFFERS * batch * heads * span * accumulation_dtype(q.dtype).itemsize
    workspace = rules.workspace
    if q.device.type == "cpu":
        workspace = min(workspace, max(CPU_CACHE, CPU_ROWS * row_bytes))
    rows = chunk_rows(row_bytes, queries, rules.left, rules.right, workspace)
    for chunk in chunks(queries, keys, rules.left, rules.right, rows):
        if rules.q_segments is None or rules.kv_segments is None or torch.compiler.is_compiling():
            yield chunk
        else:
            yield segment_span(chunk, rules.q_segments, rules.kv_segments)


def fold(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """`[B, H, m, D]` as `[B, G, H / G * m, D]`: the heads that share a key/value head stacked in the query axis."""
    batch, heads, rows, dim = x.shape
    return x.to(dtype).reshape(batch, groups, heads // groups * rows, dim)


def covered(chunks: Sequence[Chunk]) -> tuple[int, int]:
    """First and last + 1 of the keys that any chunk visits."""
    visited = [chunk for chunk in chunks if chunk.low < chunk.high]
    return min((chunk.low for chunk in visited), default=0), max((chunk.high for chunk in visited), default=0)


def bias_slice(bias: Tensor, chunk: Chunk) -> Tensor:
    """The part of `bias` `[B or 1, H or 1, M or 1, N or 1]` that falls on a chunk (a view)."""
    rows = bias if bias.shape[2] == 1 else bias[:, :, chunk.start : chunk.stop]
    return rows if bias.shape[3] == 1 else rows[..., chunk.low : chunk.high]


def sloped(scores: Tensor, alibi: Tensor, chunk: Chunk, queries: int, keys: int) -> Tensor:
    """`scores` `[B, H, m, n]` of a chunk less `alibi` `[H]` times the distance of query and key."""
    place = torch.arange(chunk.start, chunk.stop, device=scores.device) + keys - queries
    distance = (place[:, None] - torch.arange(chunk.low, chunk.high, device=scores.device)).abs()
    return torch.addcmul(scores, alibi.to(scores.dtype)[:, None, None], distance.to(scores.dtype), value=-1)


def chunk_scores(
    queries: Tensor, keys: Tensor, chunk: Chunk, rules: Rules, sizes: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """Scores `[B, H, m, n]` of a chunk, -inf where hidden, and the tanh inside the softcap (None without one).

    `queries` are folded, `keys` those of the chunk; `sizes` is (B, H, M, N).
    """
    batch, heads, total, length = sizes
    start, stop, low, high = chunk
    scores = torch.matmul(queries * rules.scale, keys.mT).view(batch, heads, stop - start, high - low)
    tanh = None
    if rules.softcap is not None:
        tanh = torch.tanh(scores / rules.softcap)
        scores = tanh * rules.softcap
    if rules.alibi is not None:
        scores = sloped(scores, rules.alibi, chunk, total, length)
    if rules.bias is not None:
        bias = bias_slice(rules.bias, chunk)
        scores = scores + bias.to(scores.dtype)
        scores = scores.masked_fill(bias == -torch.inf, -torch.inf) if rules.careful else scores
    mask = chunk_mask(chunk, total, length, rules.left, rules.right, rules.q_segments, rules.kv_segments, scores.device)
    return (scores if mask is None else scores.masked_fill_(~mask, -torch.inf)), tanh


def forward(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """`out` `[B, H, M, E]` in the inputs' dtype, `lse` `[B, H, M]`. Values must be finite, keys where a bias hides."""
    dtype = accumulation_dtype(q.dtype)
    (batch, heads, total, _), groups, length = q.shape, k.shape[1], k.shape[2]
    work = list(plan(q, k, rules))
    first, last = covered(work)
    keys, values = (x[:, :, first:last].to(dtype).contiguous() for x in (k, v))
    out = q.new_empty(batch, heads, total, v.shape[3])
    lse = q.new_empty(batch, heads, total, dtype=dtype)
    sinks = None if rules.sinks is None else rules.sinks.to(dtype)[:, None, None]
    for chunk in work:
        start, stop, low, high = chunk
        seen = slice(low - first, high - first)
        if low == high:
            out[:, :, start:stop] = 0
            lse[:, :, start:stop] = -torch.inf if sinks is None else sinks[..., 0]
            continue
        queries = fold(q[:, :, start:stop], groups, dtype)
        scores, _ = chunk_scores(queries, keys[:, :, seen], chunk, rules, (batch, heads, total, length))
        top = scores.amax(-1, keepdim=True)
        top = top if sinks is None else torch.maximum(top, sinks)
        top = top.masked_fill(top == -torch.inf, 0.0)
        weights = scores.sub_(top).exp_()
        mass = weights.sum(-1, keepdim=True)
        mass = mass if sinks is None else mass + torch.exp(sinks - top)
        lse[:, :, start:stop] = (mass.log() + top)[..., 0]
        part = torch.matmul(weights.view(*queries.shape[:3], high - low), values[:, :, seen])
        out[:, :, start:stop] = part.view(out[:, :, start:stop].shape).div_(mass.masked_fill(mass == 0, 1.0))
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, rules: Rules,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, bias (if `bias_grad`) and sinks (if there are any), each in its input's dtype."""
    dtype = accumulation_dtype(q.dtype)
    (batch, heads, total, _), groups, length = q.shape, k.shape[1], k.shape[2]
    keys, values = k.to(dtype).contiguous(), v.to(dtype).contiguous()
    dq, dk, dv = q.new_empty(q.shape), torch.zeros_like(keys), torch.zeros_like(values)
    dbias = rules.bias.new_zeros(rules.bias.shape, dtype=dtype) if rules.bias is not None and bias_grad else None
    dsinks = None if rules.sinks is None else rules.sinks.new_zeros(rules.sinks.shape, dtype=dtype)
    for chunk in plan(q, k, rules):
        start, stop, low, high = chunk
        row_lse = lse[:, :, start:stop, None]
        row_grad = lse.new_zeros(()) if grad_lse is None else grad_lse[:, :, start:stop, None].to(dtype)
        row_grad = torch.where(row_lse == -torch.inf, 0.0, row_grad)
        queries, grads = (fold(x[:, :, start:stop], groups, dtype) for x in (q, grad_out))
        scores, tanh = chunk_scores(queries, keys[:, :, low:high], chunk, rules, (batch, heads, total, length))
        row_lse = row_lse.masked_fill(row_lse == -torch.inf, torch.inf)
        weights = scores.sub_(row_lse).exp_()
        dscores = torch.matmul(grads, values[:, :, low:high].mT).view(weights.shape)
        delta = torch.linalg.vecdot(weights, dscores)[..., None] - row_grad
        dscores.sub_(delta).mul_(weights)
        if dsinks is not None and rules.sinks is not None:
            dsinks -= (torch.exp(rules.sinks.to(dtype)[:, None, None] - row_lse) * delta).sum((0, 2, 3))
        if dbias is not None:
            part = bias_slice(dbias, chunk)
            part += dscores.sum_to_size(part.shape)
        if tanh is not None:
            dscores.mul_(1 - tanh.square())
        dscores = dscores.mul_(rules.scale).view(*queries.shape[:3], high - low)
        dq[:, :, start:stop] = torch.matmul(dscores, keys[:, :, low:high]).view(dq[:, :, start:stop].shape)
        dk[:, :, low:high] += torch.matmul(dscores.mT, queries)
        dv[:, :, low:high] += torch.matmul(weights.view(dscores.shape).mT, grads)
    dbias = dbias.to(rules.bias.dtype) if dbias is not None and rules.bias is not None else None
    dsinks = dsinks.to(rules.sinks.dtype) if dsinks is not None and rules.sinks is not None else None
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias, dsinks
