"""`gather_attend`: softmax attention over a `TokenIndex` or `Boxes`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, overload

from torch import Tensor

from saccade.ops.attend.reference import reference_attention
from saccade.ops.attend.validate import check_scale, check_sinks, check_softcap, check_workspace
from saccade.ops.checks import check_qkv, resolve_scale
from saccade.ops.dispatch import Implementation, RunRecord, choose, is_recording, record
from saccade.ops.gather_attend import native, operator
from saccade.ops.gather_attend.boxes import run_boxes
from saccade.ops.straight import is_plain
from saccade.types import AttentionOutput, Boxes, TokenIndex

Call = Mapping[str, Any]
Index = TokenIndex | Boxes
"""Which keys each query sees: written out, or by rule."""


def _run(impl: str, call: Call) -> tuple[Tensor, Tensor]:
    q, k, v, index, sinks, workspace = (call[name] for name in ("q", "k", "v", "index", "sinks", "workspace"))
    softcap, scale = (
        None if call["softcap"] is None else float(call["softcap"]),
        resolve_scale(call["scale"], q.shape[3]),
    )
    if isinstance(index, Boxes):
        return run_boxes(impl, q, k, v, index, sinks, softcap, scale, workspace)
    args = (q, k, v, index.indices, sinks, index.group, index.causal, softcap, scale, workspace, impl)
    return (operator.lists_forward if is_plain(*args) else operator.gather_attend_op)(*args)


def _run_reference(call: Call) -> tuple[Tensor, Tensor]:
    mask = call["index"].to_dense()
    if mask.shape[1] == call["k"].shape[1]:
        mask = mask.repeat_interleave(call["q"].shape[1] // mask.shape[1], 1)
    return reference_attention(
        call["q"], call["k"], call["v"], mask,
        scale=resolve_scale(call["scale"], call["q"].shape[3]), softcap=call["softcap"], sinks=call["sinks"],
    )  # fmt: skip


IMPLEMENTATIONS = {
    "cpu": Implementation("cpu", partial(_run, "cpu"), native.refuses),
    "eager": Implementation("eager", partial(_run, "eager")),
    "reference": Implementation("reference", _run_reference),
}
"""By preference."""


def _check_index(index: Index, q: Tensor, k: Tensor) -> None:
    """Sizes and device of the lists."""
    if not isinstance(index, Index):
        raise ValueError(f"index of type {type(index).__name__}: expected a TokenIndex or Boxes")
    if (index.queries, index.keys) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"index for {index.queries} queries and {index.keys} keys: expected {q.shape[2]} and {k.shape[2]}"
        )
    if isinstance(index, Boxes):
        return
    if index.indices.shape[0] not in (1, q.shape[0]) or index.indices.shape[1] not in (1, k.shape[1], q.shape[1]):
        raise ValueError(
            f"index.indices of shape {tuple(index.indices.shape)}: expected batch {q.shape[0]} or 1 and "
            f"heads {q.shape[1]}, {k.shape[1]} or 1"
        )
    if index.indices.device != q.device:
        raise ValueError(f"index.indices on {index.indices.device}: expected {q.device}, as q")


@overload
def gather_attend(
    q: Tensor, k: Tensor, v: Tensor, index: Index, *, softcap: float | None = ..., sinks: Tensor | None = ...,
    scale: float | None = ..., return_lse: Literal[False] = ..., workspace: int = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def gather_attend(
    q: Tensor, k: Tensor, v: Tensor, index: Index, *, softcap: float | None = ..., sinks: Tensor | None = ...,
    scale: float | None = ..., return_lse: Literal[True], workspace: int = ..., impl: str = ...,
) -> AttentionOutput: ...  # fmt: skip
@overload
def gather_attend(
    q: Tensor, k: Tensor, v: Tensor, index: Index, *, softcap: float | None = ..., sinks: Tensor | None = ...,
    scale: float | None = ..., return_lse: bool = ..., workspace: int = ..., impl: str = ...,
) -> Tensor | AttentionOutput: ...  # fmt: skip
def gather_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Index,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    workspace: int = 256 * 2**20,
    impl: str = "auto",
) -> Tensor | AttentionOutput:
    """Softmax attention of each group of queries over its own list of keys.

    The cost is that of the listed pairs. Queries whose list is empty give output 0, LSE -inf (their sink's logit, if
    there is one) and gradient 0. NaN and inf in keys and values reach only the queries that list them, as
    in `attend`. The backward adds in a fixed order.

    Args:
        q: `[B, H, M, D]`, floating point.
        k: `[B, G, N, D]`, G divides H; dtype and device of q.
        v: `[B, G, N, E]`, dtype and device of q.
        index: The lists, for M queries and N keys, with batch B or 1 and heads H, G or 1. Unless H, the heads of a
            key/value head share one gather. A position must not repeat within a list (`index.validate()` checks). Or
            `Boxes`: the lists are intervals along the axes of a grid, the same for every head.
        softcap: Scores become `softcap * tanh(score / softcap)`; above 0.
        sinks: `[H]`, a logit per head that takes part in the softmax and brings no value.
        scale: Factor on q k^T; None means D^-0.5.
        return_lse: Also return the log-sum-exp of the scores.
        workspace: Bytes that gathered keys, values and scores may take (one list's at least).
        impl: "auto", "cpu" (the C++ engine; over lists its backward is that of "eager"), "eager" or "reference".

    Returns:
        `[B, H, M, E]` in q's dtype, or `AttentionOutput` with `return_lse`, whose `lse` is fp32 (fp64 for fp64).

    Raises:
        ValueError: If an argument is out of range or does not fit the others, or `impl` is unknown.
    """
    check_qkv(q, k, v)
    _check_index(index, q, k)
    check_softcap(softcap)
    check_sinks(sinks, q)
    check_scale(scale)
    check_workspace(workspace)
    call = {
        "q": q, "k": k, "v": v, "index": index, "softcap": softcap, "sinks": sinks, "scale": scale,
        "workspace": workspace,
    }  # fmt: skip
    chosen, refused = choose("gather_attend", IMPLEMENTATIONS, impl, call)
    if is_recording():
        record(RunRecord("gather_attend", chosen.name, refused, index.density(), pairs=q.shape[2] * k.shape[2]))
    out, lse = chosen.run(call)
    return AttentionOutput(out, lse) if return_lse else out


__all__ = ["IMPLEMENTATIONS", "gather_attend"]
