"""What `attend` refuses, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saccade.ops.checks import check_qkv, check_segments


def check_call(call: Mapping[str, Any]) -> None:
    """Check every argument of one `attend` call.

    Args:
        call: The arguments of `attend` by name.

    Raises:
        ValueError: Naming the argument, its value and what is expected.
    """
    q, k = call["q"], call["k"]
    check_qkv(q, k, call["v"])
    check_segments(q, k, call["q_segments"], call["kv_segments"])
    check_window(call["window"])
    check_bias(call["bias"], q, k)
    check_softcap(call["softcap"])
    check_sinks(call["sinks"], q)
    check_alibi(call["alibi"], q)
    check_scale(call["scale"])
    check_workspace(call["workspace"])
    if not 0.0 <= call["dropout"] < 1.0:
        raise ValueError(f"dropout={call['dropout']}: expected a fraction in [0, 1)")
    for name in ("score_mod", "normalise"):
        if call[name] is not None and not callable(call[name]):
            raise ValueError(f"{name} of type {type(call[name]).__name__}: expected a function or None")
    if call["normalise"] is None:
        return
    for name in ("score_mod", "sinks"):
        if call[name] is not None:
            raise ValueError(f"{name} and normalise: expected at most one of them")
    if call["return_lse"]:
        raise ValueError("return_lse=True: expected False with normalise, whose weights have no log-sum-exp")


def check_window(window: tuple[int, int] | None) -> None:
    """`(left, right)`, each at least -1."""
    if window is None:
        return
    pair = isinstance(window, tuple | list) and len(window) == 2
    if not pair or any(isinstance(side, bool | float | str) or side < -1 for side in window):
        raise ValueError(f"window={window!r}: expected (left, right) in tokens, each at least 0, or -1 for unbounded")


def check_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Floating point, broadcasts to `[B, H, M, N]`, on the device of q."""
    if bias is None:
        return
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        kind = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"bias of dtype {kind}: expected floating point, added to the scores (-inf hides a pair)")
    full = (*q.shape[:3], k.shape[2])
    sizes = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if bias.ndim > 4 or any(size not in (1, whole) for size, whole in zip(sizes, full, strict=True)):
        raise ValueError(f"bias of shape {tuple(bias.shape)}: expected one that broadcasts to {tuple(full)}")
    if bias.device != q.device:
        raise ValueError(f"bias on {bias.device}: expected {q.device}, as q")


def check_softcap(softcap: float | None) -> None:
    """Positive and finite."""
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap={softcap}: expected a finite number above 0, or None")


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """One floating-point logit per query head."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or tuple(sinks.shape) != (q.shape[1],):
        shape = tuple(sinks.shape) if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ValueError(f"sinks of shape {shape}: expected [{q.shape[1]}], one logit per query head")
    if not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(f"sinks is {sinks.dtype} on {sinks.device}: expected floating point on {q.device}")


def check_alibi(alibi: Tensor | None, q: Tensor) -> None:
    """One floating-point constant per query head."""
    if alibi is None:
        return
    if not isinstance(alibi, Tensor) or tuple(alibi.shape) != (q.shape[1],):
        shape = tuple(alibi.shape) if isinstance(alibi, Tensor) else type(alibi).__name__
        raise ValueError(f"alibi of shape {shape}: expected [{q.shape[1]}], one slope per query head")
    if not alibi.is_floating_point() or alibi.device != q.device:
        raise ValueError(f"alibi is {alibi.dtype} on {alibi.device}: expected floating point on {q.device}")
    if alibi.requires_grad:
        raise ValueError(
            "alibi.requires_grad=True: expected constant slopes, which get no gradient (use bias to learn)"
        )


def check_scale(scale: float | None) -> None:
    """Finite."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale={scale}: expected a finite number, or None for D^-0.5")


def check_workspace(workspace: int) -> None:
    """At least one byte."""
    if workspace < 1:
        raise ValueError(f"workspace={workspace}: expected at least 1 byte")


__all__ = ["check_alibi", "check_bias", "check_call", "check_scale", "check_sinks", "check_softcap", "check_workspace"]
