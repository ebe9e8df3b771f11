"""`scan`: linear attention and gated recurrences; `linear_mix`: without time; `diagonal_scan`: state spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.checks import accumulation_dtype, check_qkv, resolve_scale
from saccade.ops.dispatch import Implementation, RunRecord, choose, record
from saccade.ops.scan import native
from saccade.ops.scan.eager import scan_chunk, scan_step
from saccade.ops.scan.reference import reference_scan


class ScanState(NamedTuple):
    """What `scan` carries from token to token, fp32 (fp64 for fp64 inputs).

    `s` `[B, S, D, E]`: decayed sum of k v^T. `z` `[B, S, D]`: decayed sum of k, only with `normalise`, else None.
    S is G, or H where a decay or beta is given per query head.
    """

    s: Tensor
    z: Tensor | None = None


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor, float]
FORMS = ("chunk", "step", "parallel")


def _run_eager(inputs: Inputs, chunk: int, form: str) -> tuple[Tensor, Tensor]:
    if form == "step":
        return scan_step(*inputs)
    return scan_chunk(*inputs, max(inputs[1].shape[2], 1) if form == "parallel" else chunk)


def _run_native(inputs: Inputs, chunk: int, form: str) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    q, k, v, decay, _, state, scale = inputs
    return native.scan_native(q, k, v, decay, state, scale)


def _run_reference(inputs: Inputs, chunk: int, form: str) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return reference_scan(*inputs)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "cpu": Implementation("cpu", _run_native, native.refuses),
    "eager": Implementation("eager", _run_eager),
    "reference": Implementation("reference", _run_reference),
}


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalise: bool = False,
    scale: float | None = None,
    initial_state: ScanState | tuple[Tensor, Tensor | None] | None = None,
    chunk: int = 64,
    form: str = "auto",
    impl: str = "auto",
) -> tuple[Tensor, ScanState]:
    """Causal linear recurrence: S_t = a_t S_{t-1} + k_t v_t^T, out_t = scale * S_t^T q_t.

    With `beta` it is the (gated) delta rule, S_t = (I - beta_t k_t k_t^T) a_t S_{t-1} + beta_t k_t v_t^T (a decay per
    channel is a diagonal a_t in this place). Cost is linear in N. No feature map is applied: pass phi(q) and phi(k).
    The current key is not decayed: out_t holds k_t v_t^T in full.

    Args:
        q: `[B, H, N, D]`.
        k: `[B, G, N, D]`.
        v: `[B, G, N, E]`.
        log_decay: Natural log of a_t, <= 0, any floating dtype; None means 0; -inf forgets the past (chunks compute
            any decay below exp(-80), or exp(-700) in fp64, as that). `[H]` a constant per head,
            `[H, D]` a constant per head and channel, `[B or 1, H, N]` per token, `[B or 1, H, N, D]` per token and
            channel of the keys. G may stand for H.
        beta: Writing strength of the delta rule, `[B or 1, H or G, N]`; None means plain addition. Keys are used as
            they are: for a contraction 0 <= beta |k|^2 <= 2.
        normalise: Divide by q_t . z_t, z_t the equally decayed sum of keys (`scale` then cancels); rows where that is 0
            give 0. Not defined with `beta`.
        scale: Factor on the outputs; None means D^-0.5, as in every engine (papers without a factor need 1.0).
        initial_state: What an earlier call returned, to continue its sequence; None means 0.
        chunk: Tokens per chunk of the chunked form: work and memory are N * chunk + (N / chunk) * D * E. The C++ engine
            cuts its own.
        form: "chunk"; "step", the recurrence for N = 1 (decoding); "parallel", one chunk of N tokens, quadratic;
            "auto", "step" for one token and "chunk" for more. All give the same.
        impl: "auto", "cpu" (the C++ engine), "eager" or "reference" (token by token, whatever `form` and `chunk`).

    Returns:
        `out` `[B, H, N, E]` in q's dtype and the `ScanState` after the last token. Both are differentiable once.

    Raises:
        ValueError: Naming the argument, what it is and what is expected.
    """
    _check(q, k, v, log_decay, beta, normalise, chunk, form)
    tokens = q.shape[2]
    form = ("step" if tokens == 1 else "chunk") if form == "auto" else form
    implementation, refused = choose("scan", IMPLEMENTATIONS, impl, {"q": q, "v": v, "beta": beta, "form": form})
    per_head = any(x is not None and x.shape[0 if x.ndim < 3 else 1] == q.shape[1] for x in (log_decay, beta))
    states = q.shape[1] if per_head else k.shape[1]
    decay = None if log_decay is None else _spread(_decay_4d(log_decay), states)
    if beta is not None:
        beta = _spread(beta, states).expand(q.shape[0], -1, -1)
    keys, values = _spread(k, states), _spread(v, states)
    state = _start(q, states, v.shape[3], normalise, initial_state)
    if normalise:
        values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    grouped = q.unflatten(1, (states, q.shape[1] // states))
    factor = 1.0 if normalise else resolve_scale(scale, q.shape[3])
    out, state = implementation.run((grouped, keys, values, decay, beta, state, factor), chunk, form)
    record(RunRecord("scan", implementation.name, refused))
    out = out.flatten(1, 2)
    if not normalise:
        return out, ScanState(state)
    return _divide(out[..., :-1], out[..., -1:]), ScanState(state[..., :-1], state[..., -1])


def linear_mix(q: Tensor, k: Tensor, v: Tensor, *, normalise: bool = True, scale: float | None = None) -> Tensor:
    """Linear attention without causality: scale * q (k^T v), or q (k^T v) / (q . sum of k) with `normalise`.

    Args:
        q: Feature-mapped queries `[B, H, M, D]`.
        k: Feature-mapped keys `[B, G, N, D]`.
        v: `[B, G, N, E]`.
        normalise: Divide by q . (sum of k), so that `scale` cancels; rows where that is 0 give 0.
        scale: Factor on the outputs; None means D^-0.5.

    Returns:
        `[B, H, M, E]` in q's dtype.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    check_qkv(q, k, v)
    dtype = accumulation_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        keys = k.to(dtype)
        queries = q.to(dtype).unflatten(1, (k.shape[1], -1))
        out = queries @ (keys.mT @ v.to(dtype)).unsqueeze(2)
        if not normalise:
            return (out * resolve_scale(scale, q.shape[3])).flatten(1, 2).to(q.dtype)
        return _divide(out, queries @ keys.sum(2)[:, :, None, :, None]).flatten(1, 2).to(q.dtype)


def diagonal_scan(
    u: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Real diagonal state space per channel: x_t = a_t x_{t-1} + b_t u_t, y_t = c_t . x_t.

    It is `scan` with channels for heads and the state dimension for D: keys b, queries c, values u with E = 1, and a
    per-channel decay.

    Args:
        u: Inputs `[B, C, N]`.
        log_decay: Natural log of a, <= 0: `[C]`, `[C, D]`, `[B or 1, C, N]` or `[B or 1, C, N, D]`.
        b: `[C, D]`, or per token `[B, C, N, D]`.
        c: `[C, D]`, or per token `[B, C, N, D]`.
        initial_state: x before the first token, `[B, C, D]`; None means 0.
        chunk: As in `scan`.
        impl: As in `scan`.

    Returns:
        y `[B, C, N]` and x after the last token `[B, C, D]`.

    Raises:
        ValueError: Naming the argument, what it is and what is expected.
    """
    if u.ndim != 3:
        raise ValueError(f"u of shape {tuple(u.shape)}: expected [batch, channels, tokens]")
    spread = []
    for name, x in (("b", b), ("c", c)):
        if x.ndim not in (2, 4) or x.shape[-4 if x.ndim == 4 else 0 :][x.ndim == 4] != u.shape[1]:
            raise ValueError(f"{name} of shape {tuple(x.shape)}: expected [{u.shape[1]}, D] or [B, {u.shape[1]}, N, D]")
        spread.append(x if x.ndim == 4 else x[:, None].expand(u.shape[0], -1, u.shape[2], -1))
    state = None if initial_state is None else ScanState(initial_state[..., None])
    out, state = scan(
        spread[1], spread[0], u[..., None], log_decay=log_decay, scale=1.0, initial_state=state, chunk=chunk, impl=impl
    )
    return out[..., 0], state.s[..., 0]


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 0, with gradient 0, where the denominator is 0."""
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def _spread(x: Tensor, states: int) -> Tensor:
    """`x` with its axis 1 repeated from G to `states` where needed."""
    return x if x.shape[1] == states else x.repeat_interleave(states // x.shape[1], 1)


def _decay_4d(log_decay: Tensor) -> Tensor:
    """`[B or 1, H or G, N or 1, D or 1]`."""
    if log_decay.ndim == 1:
        return log_decay[None, :, None, None]
    if log_decay.ndim == 2:
        return log_decay[None, :, None]
    return log_decay[..., None] if log_decay.ndim == 3 else log_decay


def _start(
    q: Tensor, states: int, values: int, normalise: bool, initial: ScanState | tuple[Tensor, Tensor | None] | None
) -> Tensor:
    """The initial state `[B, S, D, E]`, or with the normaliser as one more column `[B, S, D, E + 1]`."""
    dtype, shape = accumulation_dtype(q.dtype), (q.shape[0], states, q.shape[3], values)
    if initial is None:
        return q.new_zeros(*shape[:3], values + normalise, dtype=dtype)
    s, z = initial
    if s.shape != shape:
        raise ValueError(f"initial_state.s of shape {tuple(s.shape)}: expected {shape}")
    if not normalise:
        if z is not None:
            raise ValueError("initial_state.z: expected None without normalise")
        return s.to(dtype)
    if z is None or z.shape != shape[:3]:
        raise ValueError(f"initial_state.z {None if z is None else tuple(z.shape)}: expected shape {shape[:3]}")
    return torch.cat([s, z[..., None]], -1).to(dtype)


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, normalise: bool, chunk: int,
    form: str,
) -> None:  # fmt: skip
    """Refuse bad arguments before any work."""
    check_qkv(q, k, v)
    batch, heads, tokens, dim = q.shape
    groups = k.shape[1]
    if k.shape[2] != tokens:
        raise ValueError(f"k of shape {tuple(k.shape)}: expected {tokens} tokens, as q")
    some_heads = {heads, groups}
    if log_decay is not None:
        fits = _fits(log_decay, (batch, some_heads, tokens, dim)) and log_decay.is_floating_point()
        if not fits:
            raise ValueError(
                f"log_decay of shape {tuple(log_decay.shape)} and {log_decay.dtype}: expected floating [{heads}], "
                f"[{heads}, {dim}], [{batch} or 1, {heads}, {tokens}] or [{batch} or 1, {heads}, {tokens}, {dim}]"
            )
    if beta is not None:
        if beta.ndim != 3 or not _fits(beta, (batch, some_heads, tokens, dim)) or not beta.is_floating_point():
            raise ValueError(
                f"beta of shape {tuple(beta.shape)} and {beta.dtype}: expected floating "
                f"[{batch} or 1, {heads} or {groups}, {tokens}]"
            )
        if normalise:
            raise ValueError("normalise=True: not defined with beta, expected False")
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} on {x.device}: expected {q.device}, as q")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1 token")
    if form not in ("auto", *FORMS):
        raise ValueError(f"form={form!r}: expected 'auto', 'chunk', 'step' or 'parallel'")
    if form == "step" and tokens != 1:
        raise ValueError(f"form='step' with {tokens} tokens: expected one token")


def _fits(x: Tensor, sizes: tuple[int, set[int], int, int]) -> bool:
    """Whether `x` has one of the shapes a decay may have."""
    batch, heads, tokens, dim = sizes
    shape = tuple(x.shape)
    if x.ndim <= 2:
        return x.ndim > 0 and shape[0] in heads and shape[1:] in ((), (dim,))
    return x.ndim <= 4 and shape[0] in (1, batch) and shape[1] in heads and shape[2:] in ((tokens,), (tokens, dim))
