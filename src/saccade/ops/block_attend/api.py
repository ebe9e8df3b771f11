"""`block_attend`: softmax attention over a `BlockLayout`."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from saccade.ops.block_attend.native import native_refuses
from saccade.ops.block_attend.op import run_op
from saccade.ops.block_attend.reference import reference_block_attend
from saccade.ops.checks import check_qkv, resolve_scale
from saccade.ops.dispatch import Implementation, RunRecord, choose, is_recording, record
from saccade.types import AttentionOutput, BlockLayout

IMPLEMENTATIONS: dict[str, Implementation] = {
    "cpu": Implementation("cpu", partial(run_op, "cpu"), native_refuses),
    "eager": Implementation("eager", partial(run_op, "eager")),
    "reference": Implementation("reference", reference_block_attend),
}
"""By preference. `run(q, k, v, layout, scale, softcap, workspace) -> (out, lse)`; sinks are folded in afterwards."""


@overload
def block_attend(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, softcap: float | None = ..., sinks: Tensor | None = ...,
    scale: float | None = ..., return_lse: Literal[False] = ..., workspace: int = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_attend(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, softcap: float | None = ..., sinks: Tensor | None = ...,
    scale: float | None = ..., return_lse: Literal[True], workspace: int = ..., impl: str = ...,
) -> AttentionOutput: ...  # fmt: skip
@overload
def block_attend(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, softcap: float | None = ..., sinks: Tensor | None = ...,
    scale: float | None = ..., return_lse: bool = ..., workspace: int = ..., impl: str = ...,
) -> Tensor | AttentionOutput: ...  # fmt: skip
def block_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    workspace: int = 256 * 2**20,
    impl: str = "auto",
) -> Tensor | AttentionOutput:
    """Softmax attention over the pairs of `layout`; nothing of size M x N exists, forward or backward.

    A row that sees nothing gives 0, lse -inf and gradient 0. NaN and inf in keys and values reach only the rows that
    see them, as in `attend`. Runs on any device; deterministic.

    Args:
        q: `[B, H, M, D]`.
        k: `[B, G, N, D]`, G dividing H.
        v: `[B, G, N, E]`.
        layout: Which pairs are computed, for `[B or 1, H or 1, M, N]`, on the device of q.
        softcap: Scores become softcap * tanh(score / softcap); None leaves them.
        sinks: `[H]`, the score of one extra key per head whose value is 0 (it only takes weight); None for none.
        scale: Factor on q k^T; None means D^-0.5.
        return_lse: Also return the log of the sum of exponentials of each row's scores, sink included.
        workspace: Bytes that temporaries may take (beside tensors of the size of the inputs); one block at least.
        impl: "auto", or the name of an implementation, which then runs or raises.

    Returns:
        `[B, H, M, E]` in the dtype of q, or `AttentionOutput` with lse `[B, H, M]` in fp32 (fp64 for fp64).

    Raises:
        ValueError: If an argument does not fit, naming it, or `impl` cannot run the call.
    """
    _check(q, k, v, layout, softcap, sinks, workspace)
    resolved = resolve_scale(scale, q.shape[3])
    call = {"q": q, "k": k, "v": v, "layout": layout, "softcap": softcap, "sinks": sinks, "workspace": workspace}
    chosen, refused = choose("block_attend", IMPLEMENTATIONS, impl, call)
    if is_recording():
        record(RunRecord("block_attend", chosen.name, refused, density=layout.density(), pairs=q.shape[2] * k.shape[2]))
    out, lse = chosen.run(q, k, v, layout, resolved, softcap, workspace)
    if sinks is not None:
        sink = sinks.to(lse.dtype)[:, None]
        out = out * torch.sigmoid(lse - sink)[..., None]
        lse = torch.logaddexp(lse, sink.expand_as(lse))
    out = out.to(q.dtype)
    return AttentionOutput(out, lse) if return_lse else out


def _check(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, softcap: float | None, sinks: Tensor | None, workspace: int
) -> None:
    """Refuse what does not fit, before any work."""
    check_qkv(q, k, v)
    if not isinstance(layout, BlockLayout):
        raise ValueError(f"layout of type {type(layout).__name__}: expected a BlockLayout")
    for name, found, expected in (("batch", layout.batch, q.shape[0]), ("heads", layout.heads, q.shape[1])):
        if found not in (1, expected):
            raise ValueError(f"layout.{name}={found}: expected 1 or {expected}, that of q")
    for name, found, expected in (("queries", layout.queries, q.shape[2]), ("keys", layout.keys, k.shape[2])):
        if found != expected:
            raise ValueError(f"layout.{name}={found}: expected {expected}, that of {'q' if name == 'queries' else 'k'}")
    if layout.device != q.device:
        raise ValueError(f"layout on {layout.device}: expected {q.device}, as q")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: expected a number above 0, or None")
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.is_floating_point()):
        raise ValueError(f"sinks of shape {tuple(sinks.shape)} and dtype {sinks.dtype}: expected floats [{q.shape[1]}]")
    if sinks is not None and sinks.device != q.device:
        raise ValueError(f"sinks on {sinks.device}: expected {q.device}, as q")
    if workspace <= 0:
        raise ValueError(f"workspace={workspace}: expected a number of bytes above 0")
