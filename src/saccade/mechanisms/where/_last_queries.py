"""What the selectors that ask the last queries of a prompt share: their attention, and its sums along diagonals."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.mechanisms.where._blocks import head_scores
from saccade.ops.checks import accumulation_dtype


def last_attention(q: Tensor, k: Tensor, count: int) -> Tensor:
    """Causal attention weights of the last `count` queries of a prompt, `[B, H, min(count, N), N]`, at least fp32."""
    dtype, keys = accumulation_dtype(q.dtype), k.shape[2]
    asked = q[:, :, max(keys - count, 0) :].to(dtype) * q.shape[3] ** -0.5
    places = torch.arange(keys - asked.shape[2], keys, device=q.device)
    hidden = torch.arange(keys, device=q.device) > places[:, None]
    return head_scores(asked, k.to(dtype)).masked_fill(hidden, -float("inf")).softmax(-1)


def diagonal_sums(weights: Tensor) -> Tensor:
    """Sum of the weights `[B, H, L, N]` of the last L queries over keys at each distance 0 .. N - 1: `[B, H, N]`."""
    rows, keys = weights.shape[-2:]
    distances = torch.arange(keys, device=weights.device)
    key = torch.arange(keys - rows, keys, device=weights.device)[:, None] - distances
    inside = weights.gather(-1, key.clamp(min=0).expand(weights.shape))
    return inside.masked_fill(key < 0, 0.0).sum(-2)
