"""`attend_groups`: softmax attention of a few queries over keys and values that are packed in groups of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.attend.native import unusable
from saccade.ops.attend.reference import reference_attention
from saccade.ops.attend.validate import check_scale, check_softcap
from saccade.ops.checks import accumulation_dtype, resolve_scale
from saccade.ops.decode_attend.api import decode_attend
from saccade.ops.dispatch import Implementation, choose
from saccade.ops.merge import merge
from saccade.types import AttentionOutput, KVPages
from saccade.types.groups import KVGroups

Call = Mapping[str, Any]

WIDE_ELEMENTS = 2**22
"""Most elements of keys and values that "eager" widens at once."""

FEW_ROWS = 64
"""Queries that share a head's groups, up to which turning codes into floats for every four of them is cheap."""


def _refuses(call: Call) -> str | None:
    """Why the engine cannot serve the call, or None."""
    q, groups = call["q"], call["groups"]
    if 0 in (*q.shape, groups.longest, groups.dims[1]):
        return "the problem is empty"
    if q.shape[1] // groups.table.shape[1] * q.shape[2] > FEW_ROWS:
        return f"the C++ engine serves up to {FEW_ROWS} queries that share packed tokens"
    for name, count in (("D", groups.dims[0]), ("E", groups.dims[1]), ("channels", groups.channels)):
        if count % cpu.GROUP_CHANNELS:
            return f"the C++ engine reads groups in {cpu.GROUP_CHANNELS} channels at a time, {name}={count}"
    return unusable(q)


def _run_cpu(call: Call) -> AttentionOutput:
    """The C++ engine reads groups in place."""
    out, lse = cpu.attend_groups(call["q"], call["groups"], call["scale"], call["softcap"])
    return merge(list(zip(out, lse, strict=True)))


def _run_eager(call: Call) -> AttentionOutput:
    """A stretch of groups widened after the other."""
    q, groups = call["q"], call["groups"]
    wide = q.to(accumulation_dtype(q.dtype))
    step = max(1, WIDE_ELEMENTS // max(1, groups.lengths.numel() * groups.size * sum(groups.dims)))
    parts = [AttentionOutput(torch.zeros_like(wide[..., :1]).expand(*q.shape[:3], groups.dims[1]),
                             wide.new_full(q.shape[:3], -torch.inf))]  # fmt: skip
    for start in range(0, groups.longest, step):
        stop = min(start + step, groups.longest)
        have = (groups.lengths - start).clamp(0, stop - start)
        cache = KVPages.from_dense(*groups.to_dense(wide.dtype, start, stop), lengths=have * groups.size)
        parts.append(
            decode_attend(wide, cache, causal=False, softcap=call["softcap"], scale=call["scale"], return_lse=True)
        )
    return merge(parts)


def _run_reference(call: Call) -> AttentionOutput:
    """In fp64, all at once."""
    q, groups = call["q"], call["groups"]
    k, v = groups.to_dense(torch.float64)
    there = torch.arange(k.shape[2], device=q.device) < (groups.lengths * groups.size)[..., None]
    mask = there.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None].expand(*q.shape[:3], -1)
    out, lse = reference_attention(q.double(), k, v, mask, scale=call["scale"], softcap=call["softcap"])
    return AttentionOutput(out, lse)


IMPLEMENTATIONS = {
    "cpu": Implementation("cpu", _run_cpu, _refuses),
    "eager": Implementation("eager", _run_eager),
    "reference": Implementation("reference", _run_reference),
}
"""By preference."""


@torch.no_grad()
def attend_groups(
    q: Tensor, groups: KVGroups, *, softcap: float | None = None, scale: float | None = None, impl: str = "auto"
) -> AttentionOutput:
    """Softmax attention of queries over all packed tokens of their heads, which come before all queries.

    Args:
        q: `[B, H, M, D]`, floating point.
        groups: The keys and values.
        softcap: Scores become `softcap * tanh(score / softcap)`; above 0.
        scale: Factor on q k^T; None means D^-0.5.
        impl: "auto", "cpu" (the C++ engine), "eager" or "reference".

    Returns:
        `out` `[B, H, M, E]` in q's dtype and `lse` `[B, H, M]` in fp32 (fp64 for fp64); 0 and -inf for heads without
        groups.

    Raises:
        ValueError: If an argument does not fit the others, or `impl` cannot run the call.
    """
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(
            f"q of shape {tuple(q.shape)} and {q.dtype}: expected floating point [batch, heads, tokens, dim]"
        )
    batch, kv_heads = groups.table.shape[:2]
    if batch != q.shape[0] or kv_heads == 0 or q.shape[1] % kv_heads or groups.dims[0] != q.shape[3]:
        shown = f"table of shape {tuple(groups.table.shape)} and head dim {groups.dims[0]}"
        raise ValueError(f"groups with a {shown}: expected those of q, {tuple(q.shape)}, or a divisor of its heads")
    check_softcap(softcap)
    check_scale(scale)
    call = {"q": q, "groups": groups, "softcap": softcap, "scale": resolve_scale(scale, q.shape[3])}
    chosen, _ = choose("attend_groups", IMPLEMENTATIONS, impl, call)
    groups.validate()
    result: AttentionOutput = chosen.run(call)
    out, lse = result
    return AttentionOutput(out.to(q.dtype), None if lse is None else lse.to(accumulation_dtype(q.dtype)))


__all__ = ["IMPLEMENTATIONS", "attend_groups"]
