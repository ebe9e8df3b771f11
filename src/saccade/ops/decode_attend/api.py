"""`decode_attend`: softmax attention of a few queries over a stored cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from saccade.ops.attend.band import band, density
from saccade.ops.attend.validate import check_scale, check_softcap, check_window, check_workspace
from saccade.ops.checks import resolve_scale
from saccade.ops.decode_attend import native, operator
from saccade.ops.decode_attend.reference import reference_decode
from saccade.ops.dispatch import Implementation, RunRecord, choose, is_recording, record
from saccade.types import AttentionOutput, KVPages

Call = Mapping[str, Any]


def _rules(call: Call) -> tuple[int, int, float | None, float]:
    """Band, cap and scale. Lengths are looked at where the work is done: here a tracer may be at work."""
    cache, q = call["cache"], call["q"]
    left, right = band(call["causal"], call["window"], q.shape[2], cache.table.shape[2] * cache.page_size)
    softcap = None if call["softcap"] is None else float(call["softcap"])
    return left, right, softcap, resolve_scale(call["scale"], q.shape[3])


def _run(impl: str, call: Call) -> tuple[Tensor, Tensor]:
    return operator.run(call["q"], call["cache"], *_rules(call), call["workspace"], impl, call["slots"])


def _run_reference(call: Call) -> tuple[Tensor, Tensor]:
    call["cache"].validate()
    return reference_decode(call["q"], call["cache"], *_rules(call), call["slots"])


IMPLEMENTATIONS = {
    "cpu": Implementation("cpu", partial(_run, "cpu"), native.refuses),
    "eager": Implementation("eager", partial(_run, "eager")),
    "reference": Implementation("reference", _run_reference),
}
"""By preference."""


def check_cache(q: Tensor, cache: KVPages) -> None:
    """Sizes, dtypes and devices of the queries and the cache."""
    if not isinstance(q, Tensor) or q.ndim != 4 or not q.is_floating_point():
        shown = f"shape {tuple(q.shape)} and dtype {q.dtype}" if isinstance(q, Tensor) else f"type {type(q).__name__}"
        raise ValueError(f"q of {shown}: expected floating point [batch, heads, tokens, dim]")
    if not isinstance(cache, KVPages):
        raise ValueError(f"cache of type {type(cache).__name__}: expected a KVPages")
    batch, kv_heads = cache.table.shape[:2]
    if batch != q.shape[0] or kv_heads == 0 or q.shape[1] % kv_heads:
        raise ValueError(
            f"cache.table of shape {tuple(cache.table.shape)}: expected batch {q.shape[0]} and a divisor of q's "
            f"{q.shape[1]} heads"
        )
    if cache.dims[0] != q.shape[3]:
        raise ValueError(f"cache with head dim {cache.dims[0]}: expected {q.shape[3]}, that of q")
    if (cache.bits is None and cache.k.dtype != q.dtype) or cache.k.device != q.device:
        raise ValueError(f"cache.k is {cache.k.dtype} on {cache.k.device}: expected {q.dtype} on {q.device}, as q")


def _check_slots(slots: Tensor, q: Tensor, cache: KVPages) -> None:
    """Shape, dtype and device of the listed places."""
    batch, kv_heads = cache.table.shape[:2]
    if slots.ndim != 3 or slots.shape[0] != batch or slots.shape[1] not in (kv_heads, q.shape[1]):
        raise ValueError(f"slots of shape {tuple(slots.shape)}: expected [{batch}, {kv_heads} or {q.shape[1]}, K]")
    if slots.dtype != torch.int64 or slots.device != q.device:
        raise ValueError(f"slots of {slots.dtype} on {slots.device}: expected torch.int64 on {q.device}")


@overload
def decode_attend(
    q: Tensor, cache: KVPages, *, slots: Tensor | None = ..., causal: bool = ..., window: tuple[int, int] | None = ...,
    softcap: float | None = ..., scale: float | None = ..., return_lse: Literal[False] = ..., workspace: int = ...,
    impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def decode_attend(
    q: Tensor, cache: KVPages, *, slots: Tensor | None = ..., causal: bool = ..., window: tuple[int, int] | None = ...,
    softcap: float | None = ..., scale: float | None = ..., return_lse: Literal[True], workspace: int = ...,
    impl: str = ...,
) -> AttentionOutput: ...  # fmt: skip
def decode_attend(
    q: Tensor,
    cache: KVPages,
    *,
    slots: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    workspace: int = 256 * 2**20,
    impl: str = "auto",
) -> Tensor | AttentionOutput:
    """Softmax attention of the newest tokens of each sequence over its stored keys and values.

    The queries are the last M of what each key/value head has stored: with lengths L `[B, G]`, query i stands at place
    i + L - M. A query that sees nothing gives output 0 and LSE -inf. NaN and inf in tokens that a query does not
    see, in pages past a head's length and in pages of nobody, never reach it; what it sees counts as in `attend`. No
    backward.

    Args:
        q: `[B, H, M, D]`, floating point.
        cache: The keys and values; floats of q's dtype, or codes. "cpu" may round what meets codes: queries to 15 bits
            of the greatest of 64 channels, weights to 16 bits of the greatest of 128 tokens.
        slots: int64 `[B, G or H, K]`: places of the tokens that the queries of each head attend to instead of all; at
            most once each, -1 is an empty place, and what lies past the head's length is not seen.
        causal: Query i sees keys j <= i + L - M only.
        window: `(left, right)`: query i sees keys i + L - M - left .. i + L - M + right; -1 = unbounded. With `causal`,
            `right` counts as 0.
        softcap: Scores become `softcap * tanh(score / softcap)`; above 0.
        scale: Factor on q k^T; None means D^-0.5.
        return_lse: Also return the log-sum-exp of the scores.
        workspace: Bytes that temporaries of "eager" may take (one token's at least).
        impl: "auto", "cpu" (the C++ engine), "eager" or "reference".

    Returns:
        `[B, H, M, E]` in q's dtype, or `AttentionOutput` with `return_lse`, whose `lse` is fp32 (fp64 for fp64).

    Raises:
        ValueError: If an argument is out of range or does not fit the others, or `impl` cannot run the call.
    """
    check_cache(q, cache)
    if slots is not None:
        _check_slots(slots, q, cache)
    check_window(window)
    check_softcap(softcap)
    check_scale(scale)
    check_workspace(workspace)
    call = {
        "q": q, "cache": cache, "slots": slots, "causal": causal, "window": window, "softcap": softcap, "scale": scale,
        "workspace": workspace,
    }  # fmt: skip
    chosen, refused = choose("decode_attend", IMPLEMENTATIONS, impl, call)
    if is_recording():
        keys = cache.longest
        kept = density(q.shape[2], keys, *band(causal, window, q.shape[2], keys), None, None)
        kept = kept if slots is None else float((slots >= 0).sum()) / max(1, slots.shape[0] * slots.shape[1] * keys)
        record(RunRecord("decode_attend", chosen.name, refused, kept, pairs=q.shape[2] * keys))
    out, lse = chosen.run(call)
    return AttentionOutput(out, lse) if return_lse else out


__all__ = ["IMPLEMENTATIONS", "check_cache", "decode_attend"]
