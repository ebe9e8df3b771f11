"""`saccade::attend` and its backward: the part of `attend` that is made of tensors only, as `torch.library` operators.

NaN and inf: where a result or an input of the backward is not finite, `poison` does the work again with care. The C++
engine's forward keeps hidden NaN and inf apart by itself.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from saccade.ops.attend import eager, flash, native, poison
from saccade.ops.attend.eager import Rules
from saccade.ops.checks import accumulation_dtype
from saccade.ops.straight import is_plain

FORWARDS = {"cpu": native.forward, "sdpa": flash.forward, "eager": eager.forward}

_SHARED = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? q_segments, Tensor? kv_segments, "
    "Tensor? alibi, int left, int right, float? softcap, float scale, int workspace, str impl"
)


def is_finite(x: Tensor) -> bool:
    """Whether all of `x` is finite: one reading pass; False also if only the sum overflows."""
    return math.isfinite(float(x.sum(dtype=accumulation_dtype(x.dtype))))


def bad_tokens(k: Tensor, v: Tensor) -> Tensor:
    """Bool `[B, G, N]`: tokens whose key or value has a NaN or inf."""
    return ~(k.isfinite().all(-1) & v.isfinite().all(-1))


def without(x: Tensor, tokens: Tensor) -> Tensor:
    """`x` `[B, G, N, .]` with the marked tokens 0."""
    return x.masked_fill(tokens[..., None], 0.0)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round the fp32 accumulation inside an operator."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, q_segments: Tensor | None,
    kv_segments: Tensor | None, alibi: Tensor | None, left: int, right: int, softcap: float | None, scale: float,
    workspace: int, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rules = Rules(left, right, softcap, scale, workspace, bias, sinks, q_segments, kv_segments, alibi)
    with no_autocast(q.device):
        out, lse = FORWARDS[impl](q, k, v, rules)
        if impl == "cpu" or is_finite(out):
            return out, lse
        if not bool(bad_tokens(k, v).any()):
            return out, lse
        return poison.forward(q, k, v, rules)


def _attend_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    sinks: Tensor | None, q_segments: Tensor | None, kv_segments: Tensor | None, alibi: Tensor | None, left: int,
    right: int, softcap: float | None, scale: float, workspace: int, impl: str, out: Tensor, lse: Tensor,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rules = Rules(left, right, softcap, scale, workspace, bias, sinks, q_segments, kv_segments, alibi)

    def run(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> poison.Grads:
        if impl == "sdpa" and grad_lse is None and not bias_grad:
            return flash.backward(grad_out, q, k, v, out, lse, rules)
        if impl == "cpu" and not bias_grad:
            return native.backward(grad_out, grad_lse, q, k, v, out, lse, rules)
        return eager.backward(grad_out, grad_lse, q, k, v, lse, rules, bias_grad)

    with no_autocast(q.device):
        finite = all(is_finite(x) for x in (q, k, v, grad_out)) and not bool(lse.isnan().any())
        if not finite or (grad_lse is not None and not is_finite(grad_lse)):
            grads = poison.backward(run, grad_out, grad_lse, q, k, v, out, lse, rules)
        else:
            grads = run(grad_out, grad_lse, q, k, v, out, lse)
    dq, dk, dv, dbias, dsinks = grads
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias, q.new_empty(0) if dsinks is None else dsinks


def _fake(q: Tensor, k: Tensor, v: Tensor, *rules: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None,  # noqa: ARG001
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = bias.new_empty(bias.shape) if bias is not None and rest[-1] else q.new_empty(0)
    dsinks = sinks.new_empty(sinks.shape) if sinks is not None else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsinks


attend_op = torch.library.custom_op(
    "saccade::attend", _attend, mutates_args=(), schema=f"({_SHARED}) -> (Tensor, Tensor)"
)
attend_backward_op = torch.library.custom_op(
    "saccade::attend_backward",
    _attend_backward,
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_lse, {_SHARED}, Tensor out, Tensor lse, bool bias_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
attend_op.register_fake(_fake)
attend_backward_op.register_fake(_fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.rules = inputs[8:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *inputs, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * (len(inputs) + len(ctx.rules))
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    call = (grad_out, grad_lse, *inputs, *ctx.rules, out, lse, ctx.needs_input_grad[3])
    *grads, dbias, dsinks = (_attend_backward if is_plain(*call) else torch.ops.saccade.attend_backward)(*call)
    dbias = dbias if ctx.needs_input_grad[3] else None
    return *grads, dbias, dsinks if ctx.needs_input_grad[4] else None, *(None,) * (len(inputs) + len(ctx.rules) - 5)


attend_op.register_autograd(_backward, setup_context=_setup_context)


def run(q: Tensor, k: Tensor, v: Tensor, rules: Rules, impl: str) -> tuple[Tensor, Tensor]:
    """The operator on `rules`."""
    call = (
        q, k, v, rules.bias, rules.sinks, rules.q_segments, rules.kv_segments, rules.alibi, rules.left, rules.right,
        rules.softcap, rules.scale, rules.workspace, impl,
    )  # fmt: skip
    return (_attend if is_plain(*call) else torch.ops.saccade.attend)(*call)


__all__ = ["attend_backward_op", "attend_op", "bad_tokens", "is_finite", "no_autocast", "run", "without"]
