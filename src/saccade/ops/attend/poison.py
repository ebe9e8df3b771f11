"""`attend` where something is NaN or inf: slower, and such that it reaches only the rows that see it.

Scores are computed from keys as they are and hidden ones replaced; values are the problem, since 0 * NaN is NaN. Those
that are not finite count as 0, and the rows that see one, found by attending with q = k = 0 to marks, become NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from saccade.ops.attend import eager
from saccade.ops.attend.eager import Rules

Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def forward(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """As `eager.forward`, for any keys and values; NaN also where an infinite value would make inf."""
    poison = ~v.isfinite()
    out, lse = eager.forward(q, k, v.masked_fill(poison, 0.0), replace(rules, careful=True))
    return (out.masked_fill(sees(poison, q.shape[1], q.shape[2], rules), torch.nan) if bool(poison.any()) else out), lse


def sees(marks: Tensor, heads: int, queries: int, rules: Rules) -> Tensor:
    """Which marks `[B, G, N, c]` of the keys each query sees, bool `[B, H, M, c]`."""
    bias = (
        None if rules.bias is None else torch.zeros_like(rules.bias).masked_fill(rules.bias == -torch.inf, -torch.inf)
    )
    plain = replace(rules, bias=bias, alibi=None, sinks=None, softcap=None)  # no weight may vanish
    query = torch.zeros(marks.shape[0], heads, queries, 1, device=marks.device)
    key = torch.zeros(*marks.shape[:3], 1, device=marks.device)
    return eager.forward(query, key, marks.float(), plain)[0] > 0


def backward(
    run: Callable[..., Grads], grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, rules: Rules,
) -> Grads:  # fmt: skip
    """Gradients that are NaN in rows that see something not finite, and for the keys that such rows see.

    `run(grad_out, grad_lse, q, k, v, out, lse)` gives those of finite inputs; lse is -inf in rows that take no part.
    """
    bad_key = ~(k.isfinite().all(-1) & v.isfinite().all(-1))[..., None]
    usable = q.isfinite().all(-1) & grad_out.isfinite().all(-1) & out.isfinite().all(-1) & lse.isfinite()
    usable = usable if grad_lse is None else usable & grad_lse.isfinite()
    empty = lse == -torch.inf
    bad = (~usable | sees(bad_key, q.shape[1], q.shape[2], rules)[..., 0]) & ~empty
    inert = bad | empty
    dq, dk, dv, dbias, dsinks = run(
        grad_out.masked_fill(inert[..., None], 0.0), None if grad_lse is None else grad_lse.masked_fill(inert, 0.0),
        q.masked_fill(inert[..., None], 0.0), k.masked_fill(bad_key, 0.0), v.masked_fill(bad_key, 0.0),
        out.masked_fill(inert[..., None], 0.0), lse.masked_fill(inert, -torch.inf),
    )  # fmt: skip
    turned = replace(
        rules, left=rules.right, right=rules.left, q_segments=rules.kv_segments, kv_segments=rules.q_segments,
        bias=None if rules.bias is None else rules.bias.mT,
    )  # fmt: skip
    reached = sees(bad[..., None], q.shape[1], k.shape[2], turned)
    reached = reached.view(k.shape[0], k.shape[1], -1, k.shape[2], 1).any(2)
    if dsinks is not None:
        dsinks = dsinks.masked_fill(bad.any(2).any(0), torch.nan)
    if dbias is not None:
        dbias = dbias + torch.zeros_like(lse).masked_fill(bad, torch.nan)[..., None].expand(
            *lse.shape, k.shape[2]
        ).sum_to_size(dbias.shape).to(dbias.dtype)
    dq = dq.masked_fill(bad[..., None], torch.nan)
    return dq, dk.masked_fill(reached, torch.nan), dv.masked_fill(reached, torch.nan), dbias, dsinks
