"""`saccade::gather_attend` and its backward as `torch.library` operators. Poison is handled as in `attend`'s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops.attend.operator import bad_tokens, is_finite, no_autocast, without
from saccade.ops.checks import accumulation_dtype
from saccade.ops.gather_attend import eager, native
from saccade.ops.gather_attend.eager import Lists
from saccade.ops.straight import is_plain

_SHARED = (
    "Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? sinks, int group, bool causal, float? softcap, float scale, "
    "int workspace, str impl"
)


def _lists(q: Tensor, k: Tensor, indices: Tensor, *rules: Any) -> Lists:
    group, causal, softcap, scale, workspace, _ = rules
    batch, heads, queries, _ = q.shape
    return Lists(
        indices, group, causal, queries, k.shape[2], batch, heads, k.shape[1], softcap, scale, workspace
    )  # fmt: skip


def lists_forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sinks: Tensor | None, *rules: Any
) -> tuple[Tensor, Tensor]:
    """Out in the dtype of q, and lse."""
    lists = _lists(q, k, indices, *rules)
    with no_autocast(q.device):
        if rules[-1] == "cpu":
            return native.forward(q, k, v, sinks, lists)
        eager.check_range(indices, k.shape[2])
        out, lse = eager.forward(q, k, v, sinks, lists)
        if is_finite(out):
            return out, lse
        poison = ~v.isfinite()
        if not bool((poison.any(-1) | ~k.isfinite().all(-1)).any()):
            return out, lse
        return eager.forward(q, k, v.masked_fill(poison, 0.0), sinks, lists, poison)


def lists_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the sinks (empty without them)."""
    *rules, out, lse = rest
    lists = _lists(q, k, indices, *rules)
    with no_autocast(q.device):
        finite = all(is_finite(x) for x in (q, k, v, grad_out)) and not bool(lse.isnan().any())
        if not finite or (grad_lse is not None and not is_finite(grad_lse)):
            dq, dk, dv, dsinks = _careful_backward(grad_out, grad_lse, q, k, v, sinks, out, lse, lists)
        else:
            dq, dk, dv, dsinks = eager.backward(grad_out, grad_lse, q, k, v, sinks, out, lse, lists)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def _careful_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor,
    lse: Tensor, lists: Lists,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients that are NaN in rows that see something not finite, and for the keys that such rows see."""
    bad_key, empty = bad_tokens(k, v), lse == -torch.inf
    usable = q.isfinite().all(-1) & grad_out.isfinite().all(-1) & out.isfinite().all(-1) & lse.isfinite()
    usable = usable if grad_lse is None else usable & grad_lse.isfinite()
    bad = (~usable | eager.sees(bad_key, lists)) & ~empty
    inert = bad | empty
    dq, dk, dv, dsinks = eager.backward(
        without(grad_out, inert), None if grad_lse is None else grad_lse.masked_fill(inert, 0.0), without(q, inert),
        without(k, bad_key), without(v, bad_key), sinks, without(out, inert), lse.masked_fill(inert, -torch.inf), lists,
    )  # fmt: skip
    reached = eager.seen_by(bad, lists)[..., None]
    dsinks = None if dsinks is None else dsinks.masked_fill(bad.any(2).any(0), torch.nan)
    dq = dq.masked_fill(bad[..., None], torch.nan)
    return dq, dk.masked_fill(reached, torch.nan), dv.masked_fill(reached, torch.nan), dsinks


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None,  # noqa: ARG001
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sinks: Tensor | None, *rest: Any,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


gather_attend_op = torch.library.custom_op(
    "saccade::gather_attend", lists_forward, mutates_args=(), schema=f"({_SHARED}) -> (Tensor, Tensor)"
)
gather_attend_backward_op = torch.library.custom_op(
    "saccade::gather_attend_backward",
    lists_backward,
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_lse, {_SHARED}, Tensor out, Tensor lse) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
gather_attend_op.register_fake(_fake)
gather_attend_backward_op.register_fake(_fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.rules = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *inputs, out, lse = ctx.saved_tensors
    rest = (None,) * len(ctx.rules)
    if grad_out is None and grad_lse is None:
        return (None,) * len(inputs) + rest
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    call = (grad_out, grad_lse, *inputs, *ctx.rules, out, lse)
    run = lists_backward if is_plain(*call) else torch.ops.saccade.gather_attend_backward
    dq, dk, dv, dsinks = run(*call)
    return dq, dk, dv, None, dsinks if ctx.needs_input_grad[4] else None, *rest


gather_attend_op.register_autograd(_backward, setup_context=_setup_context)

__all__ = ["gather_attend_backward_op", "gather_attend_op", "lists_backward", "lists_forward"]
