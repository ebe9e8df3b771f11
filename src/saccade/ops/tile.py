"""Softmax attention on batches of small dense tiles, forward and backward: the inner step of the sparse engines.

Shapes: q `[n, m, D]`, k `[n, L, D]`, v `[n, L, E]`, mask bool `[n', m', L]` (True = attend) or None. n' divides n and
m' divides m: each mask serves n / n' consecutive tiles, whose m rows are m / m' stacked copies of it; the common case
is `[n or 1, m or 1, L]`. Everything runs and is returned in the accumulation dtype (fp32, or fp64 for fp64). Values
must be finite, also where masked, and in the backward keys too: callers replace those that are not (0 * NaN is NaN).

The formulas, per row i with scores s, x = scale * q k^T:

    s = x, or softcap * tanh(x / softcap)        p = exp(s - lse)        out = p v
    delta = grad_out . out - grad_lse            ds = p * (grad_out v^T - delta)
    dx = ds * (1 - (s / softcap)^2)              dq = scale * dx k       dk = scale * dx^T q      dv = p^T grad_out

In the backward `out` and `lse` may be those of a longer row of which k, v are only a part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.checks import accumulation_dtype


def tile_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Masked scores `[n, m, L]` (-inf where hidden) of q `[n, m, D]` and k `[n, L, D]`, both of the same dtype."""
    scores = torch.bmm(q * scale, k.transpose(1, 2))
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        tiles, height, _ = mask.shape
        scores.view(tiles, -1, height, k.shape[1]).masked_fill_(~mask[:, None], -torch.inf)
    return scores


def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of each tile.

    Args:
        q: `[n, m, D]`.
        k: `[n, L, D]`.
        v: `[n, L, E]`.
        mask: Bool `[n', m', L]`, True = attend; None hides nothing.
        scale: Factor on q k^T.
        softcap: Bound on the scores; None means none.

    Returns:
        out `[n, m, E]` and lse `[n, m]`, in the accumulation dtype; 0 and -inf for rows that see nothing.
    """
    dtype = accumulation_dtype(q.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if k.shape[1] == 0:
        return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf)
    scores = tile_scores(q, k, mask, scale, softcap)
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights, v)
    out.div_(total.masked_fill(total == 0, 1.0))
    return out, total.log_().add_(top).squeeze(-1)


def tile_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `tile_forward`, the weights recomputed from `lse`.

    Args:
        grad_out: `[n, m, E]`.
        grad_lse: `[n, m]`, or None for 0; ignored in rows whose lse is -inf.
        q: `[n, m, D]`.
        k: `[n, L, D]`.
        v: `[n, L, E]`.
        mask: As in the forward.
        out: `[n, m, E]` of the whole row.
        lse: `[n, m]` of the whole row.
        scale: As in the forward.
        softcap: As in the forward.

    Returns:
        dq, dk, dv in the accumulation dtype.
    """
    dtype = accumulation_dtype(q.dtype)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - torch.where(lse == -torch.inf, 0.0, grad_lse.to(dtype))
    return tile_gradients(grad_out, delta, q, k, v, mask, lse, scale, softcap)


def tile_gradients(
    grad_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tile_backward` with delta = grad_out . out - grad_lse `[n, m]` already at hand (one for all parts of a row)."""
    dtype = accumulation_dtype(q.dtype)
    grad_out, q, k, v = grad_out.to(dtype), q.to(dtype), k.to(dtype), v.to(dtype)
    scores = tile_scores(q, k, mask, scale, softcap)
    slope = None if softcap is None else 1 - (scores / softcap).masked_fill(scores == -torch.inf, 0.0).square()
    weights = scores.sub_(lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp_()
    dv = torch.bmm(weights.transpose(1, 2), grad_out)
    dscores = torch.bmm(grad_out, v.transpose(1, 2)).sub_(delta[..., None]).mul_(weights)
    if slope is not None:
        dscores.mul_(slope)
    dscores.mul_(scale)
    return torch.bmm(dscores, k), torch.bmm(dscores.transpose(1, 2), q), dv
