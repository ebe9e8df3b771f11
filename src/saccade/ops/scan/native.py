"""The C++ engine's scan, forward and backward, as `torch.library` ops; shapes as in `eager`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.kernels import cpu

MISSING = cpu.missing()
"""Why there is no engine, or None; known at import, so that compiled code may ask."""


def refuses(call: Mapping[str, Any]) -> str | None:
    """Why the engine cannot serve the call, or None."""
    q, v = call["q"], call["v"]
    if call["beta"] is not None:
        return "the delta rule is not in the C++ engine"
    if call["form"] == "parallel":
        return "the C++ engine cuts chunks, form='parallel' is one chunk of all tokens"
    if 0 in q.shape or v.shape[3] == 0:
        return "the problem is empty"
    if q.device.type != "cpu":
        return f"the C++ engine works on CPUs, q is on {q.device.type}"
    if q.dtype == torch.float64:
        return "the C++ engine computes in fp32, q is fp64"
    return MISSING


@torch.library.custom_op("saccade::scan_native", mutates_args=())
def scan_native(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, S, R, N, E]` in q's dtype and the state after the last token."""
    return cpu.scan(q, k, v, log_decay, state, scale)


@scan_native.register_fake
def _(q, k, v, log_decay, state, scale):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG001
    return q.new_empty(*q.shape[:-1], v.shape[-1]), state.new_empty(state.shape)


@torch.library.custom_op("saccade::scan_native_backward", mutates_args=())
def scan_native_backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, decay_gradient: bool,
    dout: Tensor, dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay (without elements unless `decay_gradient`) and state."""
    dq, dk, dv, decay, dstart = cpu.scan_gradient(q, k, v, log_decay, state, scale, dout, dstate, decay_gradient)
    if log_decay is None or decay is None:
        return dq, dk, dv, k.new_empty(0), dstart
    return dq, dk, dv, decay.sum_to_size(log_decay.shape).to(log_decay.dtype), dstart


@scan_native_backward.register_fake
def _(q, k, v, log_decay, state, scale, decay_gradient, dout, dstate):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG001
    given = log_decay is not None and decay_gradient
    ddecay = log_decay.new_empty(log_decay.shape) if given else k.new_empty(0)
    dq, dk, dv, dstart = (x.new_empty(x.shape) for x in (q, k, v, state))
    return dq, dk, dv, ddecay, dstart


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG001
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout, dstate):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    q, k, v, log_decay, state = ctx.saved_tensors
    wanted = log_decay is not None and ctx.needs_input_grad[3]
    dq, dk, dv, ddecay, dstart = scan_native_backward(q, k, v, log_decay, state, ctx.scale, wanted, dout, dstate)
    return dq, dk, dv, ddecay if wanted else None, dstart, None


scan_native.register_autograd(_backward, setup_context=_setup)
