"""The C++ engine's exact attention. Poisoned keys and values it keeps apart by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.attend.eager import Rules

MISSING = cpu.missing()
"""Why there is no engine, or None; known at import, so that compiled code may ask."""

FEW_QUERIES = 16
"""Below, most lanes of the engine's panels would be idle: the kernel for decoding serves."""


def refuses(call: Mapping[str, Any]) -> str | None:
    """Why the engine cannot serve the call, or None."""
    q, k = call["q"], call["k"]
    for name in ("score_mod", "normalise"):
        if call[name] is not None:
            return f"{name} is not in the C++ engine"
    if call["dropout"] > 0:
        return "dropout is not in the C++ engine"
    if 0 in q.shape or 0 in k.shape or call["v"].shape[3] == 0:
        return "the problem is empty"
    return unusable(q)


def unusable(q: Tensor) -> str | None:
    """Why the engine cannot work on tensors like `q`, or None."""
    if q.device.type != "cpu":
        return f"the C++ engine works on CPUs, q is on {q.device.type}"
    if q.dtype == torch.float64:
        return "the C++ engine computes in fp32, q is fp64"
    return MISSING


def _arguments(rules: Rules) -> cpu.Rules:
    """`rules` as the engine takes them."""
    segments = None
    if rules.q_segments is not None and rules.kv_segments is not None:
        segments = rules.q_segments, rules.kv_segments
    return cpu.Rules(
        scale=rules.scale, left=rules.left, right=rules.right, softcap=rules.softcap, bias=rules.bias,
        segments=segments, alibi=rules.alibi,
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """As `eager.forward`, for the calls that `refuses` lets through."""
    run = cpu.decoding if q.shape[2] < FEW_QUERIES else cpu.attention
    out, lse = run(q, k, v, **_arguments(rules))
    if rules.sinks is not None:
        joint = torch.logaddexp(lse, rules.sinks.float()[:, None])
        out = out * torch.exp(lse - joint.masked_fill(joint == -torch.inf, 0.0))[..., None]
        lse = joint
    return out.to(q.dtype), lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `eager.backward`, from what `forward` returned and without the gradient of `bias`."""
    dq, dk, dv, delta = cpu.attention_backward(grad_out, grad_lse, q, k, v, out, lse, **_arguments(rules))
    dsinks = None
    if rules.sinks is not None:
        share = torch.exp(rules.sinks.float()[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf))
        dsinks = -(share * delta).sum((0, 2)).to(rules.sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, dsinks
