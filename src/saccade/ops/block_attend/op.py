"""`block_attend` as `torch.library` operators, so that it compiles whole and any implementation shares one autograd.

An implementation is a `Kernel`, entered in `KERNELS` under the name `impl=` calls it; the operators look it up there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.ops.block_attend.eager import eager_backward, eager_forward
from saccade.ops.block_attend.native import native_backward, native_forward
from saccade.ops.checks import accumulation_dtype
from saccade.ops.straight import is_plain
from saccade.types import BlockLayout

LAYOUT_TENSORS = ("indptr", "indices", "kinds", "bits")


@dataclass(frozen=True)
class Kernel:
    """Forward and backward of one implementation.

    Args:
        forward: `(q, k, v, layout, scale, softcap, workspace) -> (out, lse)`, fresh tensors: out `[B, H, M, E]` in the
            accumulation dtype (fp32, fp64 for fp64) if `wide`, else in that of q; lse `[B, H, M]` in the former.
        backward: `(grad_out, grad_lse, q, k, v, out, lse, layout, scale, softcap, workspace) -> (dq, dk, dv)`.
        wide: See `forward`. An exact out makes an exact delta in the backward; it is cast by `block_attend`.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    wide: bool = True


KERNELS: dict[str, Kernel] = {
    "cpu": Kernel(native_forward, native_backward),
    "eager": Kernel(eager_forward, eager_backward),
}


def _layout(q: Tensor, k: Tensor, *parts: Any) -> BlockLayout:
    indptr, indices, kinds, bits, batch, heads, block_q, block_k = parts
    return BlockLayout(indptr, indices, kinds, bits, batch, heads, q.shape[2], k.shape[2], (block_q, block_k))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, indptr: Tensor, indices: Tensor, kinds: Tensor, bits: Tensor,
    batch: int, heads: int, block_q: int, block_k: int, scale: float, softcap: float | None, workspace: int, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out and lse; the layout as its tensors and sizes."""
    layout = _layout(q, k, indptr, indices, kinds, bits, batch, heads, block_q, block_k)
    out, lse = KERNELS[impl].forward(q, k, v, layout, scale, softcap, workspace)
    return out.contiguous(), lse.contiguous()


forward_op = torch.library.custom_op("saccade::block_attend", _forward, mutates_args=())


@forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    exact = accumulation_dtype(q.dtype)
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=exact if KERNELS[rest[-1]].wide else q.dtype)
    return out, q.new_empty(q.shape[:3], dtype=exact)


def _backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    indptr: Tensor, indices: Tensor, kinds: Tensor, bits: Tensor,
    batch: int, heads: int, block_q: int, block_k: int, scale: float, softcap: float | None, workspace: int, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in their dtype."""
    layout = _layout(q, k, indptr, indices, kinds, bits, batch, heads, block_q, block_k)
    run = KERNELS[impl].backward
    dq, dk, dv = run(grad_out, grad_lse, q, k, v, out, lse, layout, scale, softcap, workspace)
    return dq.to(q.dtype).contiguous(), dk.to(q.dtype).contiguous(), dv.to(q.dtype).contiguous()


backward_op = torch.library.custom_op("saccade::block_attend_backward", _backward, mutates_args=())


@backward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    q, k, v = inputs[2:5]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.settings = inputs[7:]


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    call = (grad_out, grad_lse, *ctx.saved_tensors, *ctx.settings)
    grads = (_backward if is_plain(*call) else backward_op)(*call)
    return *grads, *(None,) * (4 + len(ctx.settings))


forward_op.register_autograd(_gradients, setup_context=_remember)


def run_op(
    impl: str, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, softcap: float | None, workspace: int
) -> tuple[Tensor, Tensor]:
    """The operator on a `BlockLayout`."""
    tensors = (getattr(layout, name) for name in LAYOUT_TENSORS)
    call = (q, k, v, *tensors, layout.batch, layout.heads, *layout.block, scale, softcap, workspace, impl)
    return (_forward if is_plain(*call) else forward_op)(*call)
