"""Oracle of every softmax engine: the whole score matrix in one go, in fp64 if the inputs are. Imports nothing fast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    normalise: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention under a bool `mask` that broadcasts to `[B, H, M, N]`; returns `(out, lse)`.

    Each key and value that a row may not see is replaced by 0 for that row, so NaN and inf there are inert. A bias of
    -inf hides its pair as the mask does.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, keys, values = q.to(accumulate), k.to(accumulate), v.to(accumulate)
    shape = (*q.shape[:3], k.shape[2])
    mask = mask.expand(shape)
    if bias is not None:
        mask = mask & (bias > -torch.inf)
    seen_keys = torch.where(mask[..., None], keys[:, :, None], 0.0)
    scores = (queries[:, :, :, None] * seen_keys).sum(-1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi is not None:
        place = torch.arange(shape[2], device=q.device)[:, None] + shape[3] - shape[2]
        distance = (place - torch.arange(shape[3], device=q.device)).abs()
        scores = scores - alibi.to(accumulate)[:, None, None] * distance
    if bias is not None:
        scores = scores + bias.to(accumulate).masked_fill(bias == -torch.inf, 0.0)
    if score_mod is not None:
        indices = torch.meshgrid(*(torch.arange(size, device=q.device) for size in shape), indexing="ij")
        scores = score_mod(scores, *indices)
    lse = torch.logsumexp(scores.masked_fill(~mask, -torch.inf), -1)
    lse = lse.masked_fill(lse == torch.inf, torch.nan)  # a score of +inf leaves no weight defined
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(accumulate)[None, :, None].expand_as(lse))
    if normalise is not None:
        weights = normalise(scores.masked_fill(~mask, 0.0), mask).masked_fill(~mask, 0.0)
    else:
        weights = torch.exp(scores.masked_fill(~mask, -torch.inf) - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    seen_values = torch.where(mask[..., None], values[:, :, None], 0.0)
    out = (weights[..., None] * seen_values).sum(-2)
    return out.to(q.dtype), lse


def attention_mask(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Bool `[B or 1, 1, M, N]` of causality, window and segments."""
    place = torch.arange(queries, device=device)[:, None] + keys - queries
    distance = place - torch.arange(keys, device=device)
    mask = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        mask &= distance >= 0
    if window is not None:
        left, right = window
        if left >= 0:
            mask &= distance <= left
        if right >= 0:
            mask &= distance >= -right
    mask = mask[None, None]
    if q_segments is not None and kv_segments is not None:
        same = q_segments[:, None, :, None] == kv_segments[:, None, None, :]
        mask = mask & same & (q_segments >= 0)[:, None, :, None]
    return mask
