"""`attend`: exact softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

from torch import Tensor

from saccade.ops.attend.reference import attention_mask, reference_attention
from saccade.ops.checks import check_qkv, check_segments, resolve_scale
from saccade.types import AttentionOutput


@overload
def attend(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: object) -> Tensor: ...
@overload
def attend(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: object) -> AttentionOutput: ...
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    score_mod: Callable[..., Tensor] | None = None,
    normalise: Callable[[Tensor, Tensor], Tensor] | None = None,
    return_lse: bool = False,
    workspace: int = 256 * 2**20,
    impl: str = "auto",
) -> Tensor | AttentionOutput:
    """Exact softmax attention. (Placeholder body: the engine's owner replaces everything but the signature.)"""
    check_qkv(q, k, v)
    check_segments(q, k, q_segments, kv_segments)
    mask = attention_mask(
        q.shape[2], k.shape[2], causal=causal, window=window, q_segments=q_segments, kv_segments=kv_segments,
        device=q.device,
    )  # fmt: skip
    out, lse = reference_attention(
        q, k, v, mask, scale=resolve_scale(scale, q.shape[3]), bias=bias, softcap=softcap, sinks=sinks,
        score_mod=score_mod, normalise=normalise,
    )  # fmt: skip
    return AttentionOutput(out, lse) if return_lse else out
