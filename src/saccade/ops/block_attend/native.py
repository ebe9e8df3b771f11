"""The C++ engine over a `BlockLayout`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.attend.native import unusable
from saccade.ops.block_attend.eager import careful_backward, finite
from saccade.types import BlockLayout


def native_refuses(call: Mapping[str, Any]) -> str | None:
    """Why the engine cannot serve the call, or None."""
    if 0 in call["q"].shape or 0 in call["k"].shape or call["v"].shape[3] == 0:
        return "the problem is empty"
    return unusable(call["q"])


def native_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, softcap: float | None,
    workspace: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `eager_forward`; its temporaries are a few tiles per thread."""
    return cpu.attention(q, k, v, scale=scale, softcap=softcap, layout=layout)


def native_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: BlockLayout,
    scale: float, softcap: float | None, workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `eager_backward`; its temporaries are a number per query and a few tiles per thread."""
    rules = cpu.Rules(scale=scale, softcap=softcap, layout=layout)
    if all(finite(tensor) for tensor in (q, k, v, grad_out, grad_lse)):
        dq, dk, dv, _ = cpu.attention_backward(grad_out, grad_lse, q, k, v, out, lse, **rules)
        return dq, dk, dv

    def run(grad_out: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return cpu.attention_backward(grad_out, None, q, k, v, out, lse, delta=delta, **rules)[:3]

    delta = (grad_out.to(lse.dtype) * out).sum(-1).sub_(grad_lse).masked_fill_(lse == -torch.inf, 0.0)
    return careful_backward(run, grad_out, delta, q, k, v, lse, layout, workspace)
