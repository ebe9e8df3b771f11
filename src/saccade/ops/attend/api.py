"""`attend`: exact softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, overload

from torch import Tensor

from saccade.ops.attend import composite, flash, native, operator
from saccade.ops.attend.band import band, density
from saccade.ops.attend.eager import Rules
from saccade.ops.attend.reference import attention_mask, reference_attention
from saccade.ops.attend.validate import check_call
from saccade.ops.checks import resolve_scale
from saccade.ops.dispatch import Implementation, RunRecord, choose, is_recording, record
from saccade.types import AttentionOutput

Call = Mapping[str, Any]


def _rules(call: Call) -> Rules:
    """The call as the engines' rules: band, scale and a 4-D bias."""
    q, k, bias = call["q"], call["k"], call["bias"]
    left, right = band(call["causal"], call["window"], q.shape[2], k.shape[2])
    return Rules(
        left, right, None if call["softcap"] is None else float(call["softcap"]),
        resolve_scale(call["scale"], q.shape[3]), call["workspace"],
        None if bias is None else bias[(None,) * (4 - bias.ndim)],
        call["sinks"], call["q_segments"], call["kv_segments"], call["alibi"],
    )  # fmt: skip


def _run_fused(impl: str, call: Call) -> tuple[Tensor, Tensor]:
    return operator.run(call["q"], call["k"], call["v"], _rules(call), impl)


def _run_eager(call: Call) -> tuple[Tensor, Tensor]:
    if call["score_mod"] is None and call["normalise"] is None and call["dropout"] == 0:
        return operator.run(call["q"], call["k"], call["v"], _rules(call), "eager")
    callbacks = composite.Callbacks(call["score_mod"], call["normalise"], float(call["dropout"]))
    return composite.run(call["q"], call["k"], call["v"], _rules(call), callbacks)


def _run_reference(call: Call) -> tuple[Tensor, Tensor]:
    q, k = call["q"], call["k"]
    mask = attention_mask(
        q.shape[2], k.shape[2], causal=call["causal"], window=call["window"], q_segments=call["q_segments"],
        kv_segments=call["kv_segments"], device=q.device,
    )  # fmt: skip
    return reference_attention(
        q, k, call["v"], mask, scale=resolve_scale(call["scale"], q.shape[3]), bias=call["bias"],
        softcap=call["softcap"], alibi=call["alibi"], sinks=call["sinks"], score_mod=call["score_mod"],
        normalise=call["normalise"],
    )  # fmt: skip


def _reference_refuses(call: Call) -> str | None:
    return "dropout is random, the reference is an oracle" if call["dropout"] > 0 else None


IMPLEMENTATIONS = {
    "cpu": Implementation("cpu", partial(_run_fused, "cpu"), native.refuses),
    "sdpa": Implementation("sdpa", partial(_run_fused, "sdpa"), flash.refuses),
    "eager": Implementation("eager", _run_eager),
    "reference": Implementation("reference", _run_reference, _reference_refuses),
}
"""By preference."""


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: tuple[int, int] | None = ...,
    bias: Tensor | None = ..., alibi: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    q_segments: Tensor | None = ..., kv_segments: Tensor | None = ..., scale: float | None = ...,
    dropout: float = ..., score_mod: Callable[..., Tensor] | None = ...,
    normalise: Callable[[Tensor, Tensor], Tensor] | None = ..., return_lse: Literal[False] = ...,
    workspace: int = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: tuple[int, int] | None = ...,
    bias: Tensor | None = ..., alibi: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    q_segments: Tensor | None = ..., kv_segments: Tensor | None = ..., scale: float | None = ...,
    dropout: float = ..., score_mod: Callable[..., Tensor] | None = ...,
    normalise: Callable[[Tensor, Tensor], Tensor] | None = ..., return_lse: Literal[True],
    workspace: int = ..., impl: str = ...,
) -> AttentionOutput: ...  # fmt: skip
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: tuple[int, int] | None = ...,
    bias: Tensor | None = ..., alibi: Tensor | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    q_segments: Tensor | None = ..., kv_segments: Tensor | None = ..., scale: float | None = ...,
    dropout: float = ..., score_mod: Callable[..., Tensor] | None = ...,
    normalise: Callable[[Tensor, Tensor], Tensor] | None = ..., return_lse: bool = ...,
    workspace: int = ..., impl: str = ...,
) -> Tensor | AttentionOutput: ...  # fmt: skip
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
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
    """Exact softmax attention.

    Each score is `scale * q . k`, then capped, lowered by distance (`alibi`), biased and given to `score_mod`, in this
    order. A query that sees no key gives output 0, LSE -inf (its sink's logit, if it has one) and gradient 0. NaN and
    inf in keys and values that a query does not see never reach it. What it does see gives what the formula gives: a
    NaN score or one of +inf makes its output and LSE NaN; one of -inf has weight 0; a NaN or inf in a value makes that
    channel NaN or inf, however small the weight (0 * inf is NaN). Their gradients, and those of the keys and values
    that such queries see, are NaN or mean nothing; all others are as without it. With `score_mod`, `normalise` or
    `dropout`, a query that sees a NaN or inf may be NaN throughout.

    Args:
        q: `[B, H, M, D]`, floating point.
        k: `[B, G, N, D]`, G divides H; dtype and device of q.
        v: `[B, G, N, E]`, dtype and device of q.
        causal: Query i sees keys j <= i + N - M only.
        window: `(left, right)`: query i sees keys i + N - M - left .. i + N - M + right; -1 = unbounded. With `causal`,
            `right` counts as 0. Keys outside a chunk's windows are not read: the cost is M * (left + right).
        bias: Added to the scores; broadcasts to `[B, H, M, N]`. -inf hides a pair.
        alibi: `[H]`, finite slopes: the score of query i and key j loses `alibi[h] * |i + N - M - j|`. They get no
            gradient: slopes that require one are refused.
        softcap: Scores become `softcap * tanh(score / softcap)`; above 0.
        sinks: `[H]`, a logit per head that takes part in the softmax and brings no value.
        q_segments: int `[B or 1, M]`: a query sees the keys of its own segment. Negative sees nothing.
        kv_segments: int `[B or 1, N]`; given exactly when `q_segments` is.
        scale: Factor on q k^T; None means D^-0.5.
        dropout: Probability in [0, 1) that a weight is dropped; kept ones are divided by 1 - dropout.
        score_mod: `(score, b, h, q_idx, kv_idx) -> score`, FlexAttention's form, called on `[B, H, m, n]` chunks with
            index tensors that broadcast to it. Differentiable, also in what it closes over.
        normalise: `(scores, mask) -> weights` in place of the softmax, called on chunks `[B, H, m, n]` of whole rows:
            keys 0 .. n - 1, none of those after them visible. Scores are finite, hidden ones 0.
        return_lse: Also return the log-sum-exp of the scores.
        workspace: Bytes that temporaries of size queries x keys may take (one query's at least).
        impl: "auto", "cpu" (the C++ engine), "sdpa" (PyTorch's fused kernel, CPU), "eager" or "reference".

    Returns:
        `[B, H, M, E]` in q's dtype, or `AttentionOutput` with `return_lse`, whose `lse` is fp32 (fp64 for fp64).

    Raises:
        ValueError: If an argument is out of range or does not fit the others, or `impl` cannot run the call.
    """
    call = {
        "q": q, "k": k, "v": v, "causal": causal, "window": window, "bias": bias, "alibi": alibi,
        "softcap": softcap, "sinks": sinks, "q_segments": q_segments, "kv_segments": kv_segments, "scale": scale,
        "dropout": dropout, "score_mod": score_mod, "normalise": normalise, "return_lse": return_lse,
        "workspace": workspace,
    }  # fmt: skip
    check_call(call)
    chosen, refused = choose("attend", IMPLEMENTATIONS, impl, call)
    if is_recording():
        left, right = band(causal, window, q.shape[2], k.shape[2])
        kept = density(q.shape[2], k.shape[2], left, right, q_segments, kv_segments)
        record(RunRecord("attend", chosen.name, refused, kept, pairs=q.shape[2] * k.shape[2]))
    out, lse = chosen.run(call)
    return AttentionOutput(out, lse) if return_lse else out
