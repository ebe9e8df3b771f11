"""PyTorch's fused CPU attention, taught bottom-right causality for any M and N, unequal head dims and sinks.

The fused kernel's causality is top-left. With M <= N the first N - M keys are seen by every query and the rest is a
square, where top-left and bottom-right agree: two calls, joined by their LSE. With M > N the first M - N queries see
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.ops.attend.band import band
from saccade.ops.attend.eager import Rules
from saccade.ops.checks import accumulation_dtype

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


def refuses(call: Mapping[str, Any]) -> str | None:
    """Why the fused kernel cannot serve the call, or None."""
    q, k, bias = call["q"], call["k"], call["bias"]
    for name in ("score_mod", "normalise", "softcap", "alibi", "q_segments"):
        if call[name] is not None:
            return f"{name} is not in PyTorch's fused kernel"
    if call["dropout"] > 0:
        return "dropout is not in PyTorch's fused CPU kernel"
    if q.device.type != "cpu":
        return f"on {q.device.type} PyTorch's fused kernels differ in which calls return the LSE"
    if 0 in q.shape or 0 in k.shape or call["v"].shape[3] == 0:
        return "the problem is empty"
    left, right = band(call["causal"], call["window"], q.shape[2], k.shape[2])
    if left >= 0 or right > 0:
        return "a window is not in PyTorch's fused kernel"
    if bias is None:
        return None
    if bias.requires_grad and torch.is_grad_enabled():
        return "PyTorch's fused kernel has no gradient of bias"
    if bias.dtype != q.dtype:
        return f"bias is {bias.dtype}, PyTorch's fused kernel expects {q.dtype}"
    return None if right < 0 else "PyTorch's fused kernel does not tell rows that causality and bias leave empty"


def _padded(x: Tensor, dim: int) -> Tensor:
    """`x` with zeros up to head dim `dim`, its last axis contiguous."""
    x = x if x.shape[3] == dim else torch.nn.functional.pad(x, (0, dim - x.shape[3]))
    return x if x.stride(3) == 1 else x.contiguous()


def _parts(queries: int, keys: int, right: int) -> tuple[int, list[tuple[int, int, bool]]]:
    """First query that sees anything, and the kernel calls as (first key, last key + 1, causal)."""
    if right < 0:
        return 0, [(0, keys, False)]
    first = max(queries - keys, 0)
    seen_by_all = keys - (queries - first)
    square = (seen_by_all, keys, True)
    return first, [(0, seen_by_all, False), square] if seen_by_all else [square]


def forward(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """As `eager.forward`, for the calls that `refuses` lets through."""
    dtype, values = accumulation_dtype(q.dtype), v.shape[3]
    dim = max(q.shape[3], values)
    first, parts = _parts(q.shape[2], k.shape[2], rules.right)
    queries, keys, v = _padded(q, dim)[:, :, first:], _padded(k, dim), _padded(v, dim)
    results = [
        _forward(queries, keys[:, :, low:high], v[:, :, low:high], 0.0, causal, attn_mask=rules.bias, scale=rules.scale)
        for low, high, causal in parts
    ]
    out, lse = results[0][0], results[0][1].to(dtype)
    if len(results) == 2:
        joint = torch.logaddexp(lse, results[1][1].to(dtype))
        share = torch.exp(lse - joint)[..., None]
        out, lse = torch.lerp(results[1][0].to(dtype), out.to(dtype), share), joint
    if rules.bias is not None:
        # The kernel reports LSE 0 for a row whose every key has bias -inf.
        lse = lse.masked_fill((rules.bias == -torch.inf).all(-1), -torch.inf)
    if first:
        out = torch.nn.functional.pad(out, (0, 0, first, 0))
        lse = torch.nn.functional.pad(lse, (first, 0), value=-torch.inf)
    if rules.sinks is not None:
        joint = torch.logaddexp(lse, rules.sinks.to(dtype)[:, None])
        share = torch.exp(lse - joint.masked_fill(joint == -torch.inf, 0.0))
        out, lse = out.to(dtype) * share[..., None], joint
    return out[..., :values].to(q.dtype).contiguous(), lse.contiguous()


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `eager.backward`, without gradients into `lse` and `bias`: the fused kernel has neither."""
    dtype, values = accumulation_dtype(q.dtype), v.shape[3]
    dim = max(q.shape[3], values)
    first, parts = _parts(q.shape[2], k.shape[2], rules.right)
    queries, keys, padded_v = _padded(q, dim)[:, :, first:], _padded(k, dim), _padded(v, dim)
    grads, outs = (_padded(x, dim)[:, :, first:] for x in (grad_out, out))
    rows = lse[:, :, first:].contiguous()
    # Rows that see nothing: the kernel must find zero weights, not exp(-inf + inf).
    rows = rows.masked_fill(rows == -torch.inf, torch.inf)
    results = [
        _backward(
            grads, queries, keys[:, :, low:high], padded_v[:, :, low:high], outs, rows, 0.0, causal,
            attn_mask=rules.bias, scale=rules.scale,
        )
        for low, high, causal in parts
    ]  # fmt: skip
    dq = torch.nn.functional.pad(sum(result[0] for result in results), (0, 0, first, 0))[..., : q.shape[3]]
    dk, dv = (torch.cat([result[i] for result in results], 2) for i in (1, 2))
    dsinks = None
    if rules.sinks is not None:
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
        share = torch.exp(rules.sinks.to(dtype)[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf))
        dsinks = -(share * delta).sum((0, 2)).to(rules.sinks.dtype)
    return dq.contiguous(), dk[..., : k.shape[3]].contiguous(), dv[..., :values].contiguous(), None, dsinks
