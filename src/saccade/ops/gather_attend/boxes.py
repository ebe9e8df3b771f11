"""`saccade::boxes_attend` and its backward: attention within boxes of a grid, as `torch.library` operators.

On the C++ engine a tile of neighbouring queries shares the keys that any of them sees, read in place. In portable
PyTorch the boxes become a `BlockLayout` or a `TokenIndex`, whichever is cheaper, and the eager engines run it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.block_attend.eager import eager_backward, eager_forward
from saccade.ops.checks import accumulation_dtype
from saccade.ops.gather_attend.operator import lists_backward, lists_forward
from saccade.ops.straight import is_plain
from saccade.types import BlockLayout, Boxes

_SHARED = (
    "Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, int[] sizes, int[] dilation, int block, float? softcap, "
    "float scale, int workspace, str impl"
)


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    first, last, sizes, dilation, block, softcap, scale, workspace, impl = rest
    if impl == "cpu":
        return cpu.boxes_attention(q, k, v, first, last, sizes, dilation, scale)
    chosen = Boxes(first, last, tuple(sizes), tuple(dilation), block).portable(q.device)
    if isinstance(chosen, BlockLayout):
        out, lse = eager_forward(q, k, v, chosen, scale, softcap, workspace)
    else:
        rules = (chosen.group, chosen.causal, softcap, scale, workspace, "eager")
        out, lse = lists_forward(q, k, v, chosen.indices, None, *rules)
    return out.to(lse.dtype).contiguous(), lse.contiguous()


def _backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    first, last, sizes, dilation, block, softcap, scale, workspace, impl = rest
    if impl == "cpu":
        grads = cpu.boxes_gradients(grad_out, grad_lse, q, k, v, out, lse, first, last, sizes, dilation, scale)
    else:
        chosen = Boxes(first, last, tuple(sizes), tuple(dilation), block).portable(q.device)
        if isinstance(chosen, BlockLayout):
            grads = eager_backward(grad_out, grad_lse, q, k, v, out, lse, chosen, scale, softcap, workspace)
        else:
            rules = (chosen.group, chosen.causal, softcap, scale, workspace, "eager")
            given = (grad_out.to(q.dtype), grad_lse, q, k, v, chosen.indices, None)
            grads = lists_backward(*given, *rules, out.to(q.dtype), lse)[:3]
    dq, dk, dv = (grad.to(q.dtype).contiguous() for grad in grads)
    return dq, dk, dv


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    exact = accumulation_dtype(q.dtype)
    return q.new_empty(*q.shape[:3], v.shape[3], dtype=exact), q.new_empty(q.shape[:3], dtype=exact)


def _fake_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs[2:5]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


boxes_attend_op = torch.library.custom_op(
    "saccade::boxes_attend", _forward, mutates_args=(), schema=f"({_SHARED}) -> (Tensor, Tensor)"
)
boxes_attend_backward_op = torch.library.custom_op(
    "saccade::boxes_attend_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad_out, Tensor grad_lse, "
    + _SHARED.replace("Tensor first", "Tensor out, Tensor lse, Tensor first")
    + ") -> (Tensor, Tensor, Tensor)",
)
boxes_attend_op.register_fake(_fake)
boxes_attend_backward_op.register_fake(_fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.settings = inputs[5:]


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    call = (grad_out, grad_lse, *ctx.saved_tensors, *ctx.settings)
    grads = (_backward if is_plain(*call) else boxes_attend_backward_op)(*call)
    return *grads, *(None,) * (2 + len(ctx.settings))


boxes_attend_op.register_autograd(_gradients, setup_context=_setup_context)


def run_boxes(
    impl: str, q: Tensor, k: Tensor, v: Tensor, boxes: Boxes, sinks: Tensor | None, softcap: float | None,
    scale: float, workspace: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out in the dtype of q, and lse."""
    call = (
        q, k, v, boxes.first, boxes.last, list(boxes.sizes), list(boxes.dilation), boxes.block, softcap, scale,
        workspace, impl,
    )  # fmt: skip
    out, lse = (_forward if is_plain(*call) else boxes_attend_op)(*call)
    if sinks is not None:
        sink = sinks.to(lse.dtype)[:, None]
        out = out * torch.sigmoid(lse - sink)[..., None]
        lse = torch.logaddexp(lse, sink.expand_as(lse))
    return out.to(q.dtype), lse


__all__ = ["boxes_attend_backward_op", "boxes_attend_op", "run_boxes"]
