"""`block_attend`: softmax attention over a `BlockLayout`."""

from __future__ import annotations

from torch import Tensor

from saccade.ops.attend.reference import reference_attention
from saccade.ops.checks import check_qkv, resolve_scale
from saccade.types import AttentionOutput, BlockLayout


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
    """Softmax attention over the pairs of `layout`. (Placeholder body: the engine's owner replaces it.)"""
    check_qkv(q, k, v)
    out, lse = reference_attention(
        q, k, v, layout.to_dense(), scale=resolve_scale(scale, q.shape[3]), softcap=softcap, sinks=sinks
    )
    return AttentionOutput(out, lse) if return_lse else out
