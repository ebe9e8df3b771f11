"""Oracle of `scan`: the recurrence, token after token, in plain differentiable PyTorch. Imports nothing fast."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, S, R, N, E]` and the last state from q `[B, S, R, N, D]`, k `[B, S, N, D]`, v `[B, S, N, E]`.

    `log_decay` `[B or 1, S, N or 1, D or 1]`, `beta` `[B, S, N]`, `state` `[B, S, D, E]` in the accumulation dtype.
    """
    dtype, tokens = state.dtype, k.shape[2]
    if log_decay is not None:
        log_decay = log_decay.to(dtype).expand(-1, -1, tokens, -1)
    outputs = []
    for t in range(tokens):
        key, value = k[:, :, t].to(dtype), v[:, :, t].to(dtype)
        if log_decay is not None:
            state = log_decay[:, :, t].exp()[..., None] * state
        if beta is not None:
            recalled = torch.einsum("bsd,bsde->bse", key, state)
            value = beta[:, :, t, None].to(dtype) * (value - recalled)
        state = state + torch.einsum("bsd,bse->bsde", key, value)
        outputs.append(scale * torch.einsum("bsrd,bsde->bsre", q[:, :, :, t].to(dtype), state))
    if not outputs:
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), state
    return torch.stack(outputs, 3).to(q.dtype), state
