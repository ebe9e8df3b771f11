"""Chunked scan in portable PyTorch, forward and hand-written backward, as `torch.library` ops.

With u_t = v_t, or beta_t (v_t - S_{t-1}^T (a_t k_t)) under the delta rule, every recurrence is
S_t = a_t S_{t-1} + k_t u_t^T. Inside a chunk of L tokens that starts from state S, with c the inclusive cumulative log
decay and P the decayed products of `pairs`:

    out = P(q, k) u + (q e^c) S          u = v,   or   (I + beta tril(P(k, k), -1)) u = beta (v - (k e^c) S)
    S'  = e^{c_L} S + (k e^{c_L - c})^T u

Everything is a batched matmul over all chunks, except the recurrence of the D x E states from chunk to chunk. The
backward pass recomputes the forward one, so that no state is kept between them. Memory is linear in N.

Shapes: q `[B, S, R, N, D]`, k `[B, S, N, D]`, v `[B, S, N, E]`, decay `[B or 1, S, N or 1, D or 1]`, beta `[B, S, N]`,
state `[B, S, D, E]`: S states, R query heads read each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.checks import accumulation_dtype
from saccade.ops.scan.pairs import fold, pair_gradients, pair_products, unfold

FLOOR = {torch.float32: -80.0, torch.float64: -700.0}
"""Smallest log decay per token: differences of cumulative sums need finite terms, and exp of it is 0 but for 1e-34."""


class _Part(NamedTuple):
    """n whole chunks of L tokens, in the accumulation dtype."""

    groups: Tensor  # [B, S, n, R, L, D], scaled queries; under the delta rule the keys are one more set of queries
    k: Tensor  # [B, S, n, L, D]
    v: Tensor  # [B, S, n, L, E]
    cumulative: Tensor  # [B or 1, S, n or 1, L, D or 1]
    beta: Tensor | None  # [B, S, n, L, 1]

    def from_start(self) -> Tensor:
        """Decay from the chunk's start to each token."""
        return self.cumulative.exp()

    def to_end(self) -> Tensor:
        """Decay from each token to the chunk's end."""
        return (self.cumulative[..., -1:, :] - self.cumulative).exp_()

    def whole(self) -> Tensor:
        """Decay of the state over each chunk, `[B or 1, S, n, D or 1, 1]`."""
        decay = self.cumulative[..., -1, :, None].exp()
        return decay.expand(-1, -1, self.k.shape[2], -1, -1)


class _Solved(NamedTuple):
    """What a chunk computes: u, the states the chunks start from, the products, and the delta rule's matrix."""

    u: Tensor  # [B, S, n, L, E]
    starts: Tensor  # [B, S, n, D, E]
    products: Tensor  # [B, S, n, R', L, L]
    lower: Tensor | None  # [B, S, n, L, L], strictly lower part of I + beta tril(P(k, k), -1)


def _ranges(tokens: int, chunk: int) -> list[tuple[int, int, int]]:
    """`(start, stop, chunk length)` of the whole chunks and of the shorter last one: no padding, no copies."""
    whole = tokens - tokens % chunk
    parts = [(0, whole, chunk), (whole, tokens, tokens - whole)]
    return [part for part in parts if part[1] > part[0]]


def _part(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, scale: float,
    span: tuple[int, int, int],
) -> _Part:  # fmt: skip
    start, stop, length = span
    dtype = accumulation_dtype(q.dtype)

    def cut(x: Tensor, axis: int = 2) -> Tensor:
        return x.narrow(axis, start, stop - start).to(dtype).unflatten(axis, (-1, length))

    keys = cut(k)
    groups = cut(q, 3).transpose(2, 3) * scale
    if beta is not None:
        groups = torch.cat([groups, keys.unsqueeze(3)], 3)
    if log_decay is None:
        cumulative = keys.new_zeros(1, k.shape[1], 1, length, 1)
    elif log_decay.shape[2] == 1:
        steps = torch.arange(1, length + 1, device=k.device, dtype=dtype)
        cumulative = log_decay.to(dtype).clamp(min=FLOOR[dtype])[:, :, None] * steps[:, None]
    else:
        cumulative = cut(log_decay).clamp(min=FLOOR[dtype]).cumsum(3)
    return _Part(groups, keys, cut(v), cumulative, None if beta is None else cut(beta)[..., None])


def _solve(part: _Part, state: Tensor) -> tuple[_Solved, Tensor]:
    """Run the chunks; also the state after the last."""
    products = pair_products(part.groups, part.k, part.cumulative)
    keys_end, whole = part.k * part.to_end(), part.whole()
    starts = state.new_empty(*part.k.shape[:3], *state.shape[2:])
    if part.beta is None:
        updates = keys_end.mT @ part.v
        for chunk in range(starts.shape[2]):
            starts[:, :, chunk] = state
            state = torch.addcmul(updates[:, :, chunk], whole[:, :, chunk], state)
        return _Solved(part.v, starts, products, None), state
    lower = (products[..., -1, :, :] * part.beta).tril_(-1)
    known = torch.cat([part.v, part.k * part.from_start()], -1) * part.beta
    known = torch.linalg.solve_triangular(lower, known, upper=False, unitriangular=True)
    values, reads = known.split([part.v.shape[-1], part.k.shape[-1]], -1)
    u = torch.empty_like(part.v)
    for chunk in range(starts.shape[2]):
        starts[:, :, chunk] = state
        u[:, :, chunk] = values[:, :, chunk] - reads[:, :, chunk] @ state
        state = torch.addcmul(keys_end[:, :, chunk].mT @ u[:, :, chunk], whole[:, :, chunk], state)
    return _Solved(u, starts, products, lower), state


def _read(part: _Part, solved: _Solved, sets: int) -> Tensor:
    """Outputs `[B, S, R, n * L, E]` of the query sets."""
    within = fold(solved.products[:, :, :, :sets]) @ solved.u
    queries = part.groups[:, :, :, :sets] * part.from_start().unsqueeze(3)
    return unfold(within + fold(queries) @ solved.starts, sets).transpose(2, 3).flatten(3, 4)


class _Adjoint(NamedTuple):
    """Gradients that flow against time."""

    du: Tensor  # [B, S, n, L, E], with respect to beta (v - ...) under the delta rule, else to v
    ends: Tensor  # [B, S, n, D, E], with respect to the state after each chunk


def _reverse(part: _Part, solved: _Solved, dout: Tensor, dstate: Tensor) -> tuple[_Adjoint, Tensor]:
    """Carry the gradient of the state from the last chunk to the first; also that of the initial state."""
    sets = dout.shape[3]
    from_start, keys_end, whole = part.from_start(), part.k * part.to_end(), part.whole()
    direct = fold(solved.products[:, :, :, :sets]).mT @ fold(dout)
    sources = fold(part.groups[:, :, :, :sets] * from_start.unsqueeze(3)).mT @ fold(dout)
    ends = torch.empty_like(solved.starts)
    if part.beta is None or solved.lower is None:
        for chunk in reversed(range(ends.shape[2])):
            ends[:, :, chunk] = dstate
            dstate = torch.addcmul(sources[:, :, chunk], whole[:, :, chunk], dstate)
        return _Adjoint(direct + keys_end @ ends, ends), dstate
    known = torch.cat([direct, keys_end], -1)
    known = torch.linalg.solve_triangular(solved.lower.mT, known, upper=True, unitriangular=True)
    values, reads = known.split([direct.shape[-1], keys_end.shape[-1]], -1)
    written = part.k * from_start * part.beta
    du = torch.empty_like(direct)
    for chunk in reversed(range(ends.shape[2])):
        ends[:, :, chunk] = dstate
        du[:, :, chunk] = values[:, :, chunk] + reads[:, :, chunk] @ dstate
        sources[:, :, chunk] -= written[:, :, chunk].mT @ du[:, :, chunk]
        dstate = torch.addcmul(sources[:, :, chunk], whole[:, :, chunk], dstate)
    return _Adjoint(du, ends), dstate


def _gradients(
    part: _Part, solved: _Solved, adjoint: _Adjoint, dout: Tensor, after: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the scaled queries `[B, S, n, R, L, D]`, k, v, log decay per token and channel, and beta.

    `after` `[B, S, n, D, E]` are the states after each chunk, None if the decay's gradient is not wanted.
    """
    sets, from_start = dout.shape[3], part.from_start()
    dv, dbeta, douts = adjoint.du, None, dout
    if part.beta is not None:
        dv = adjoint.du * part.beta
        douts = torch.cat([dout, -dv.unsqueeze(3)], 3)
        recalled = (part.k * from_start) @ solved.starts + solved.products[..., -1, :, :].tril(-1) @ solved.u
        dbeta = (adjoint.du * (part.v - recalled)).sum(-1)
    dproducts = unfold(fold(douts) @ solved.u.mT, douts.shape[3])
    if part.beta is not None:
        dproducts[..., -1, :, :].tril_(-1)
    dgroups, dkeys = pair_gradients(dproducts, part.groups, part.k, part.cumulative)
    dgroups = dgroups.addcmul_(unfold(fold(douts) @ solved.starts.mT, douts.shape[3]), from_start.unsqueeze(3))
    dkeys = dkeys.addcmul_(solved.u @ adjoint.ends.mT, part.to_end())
    # A product a_i k_j exp(c_i - c_j) gives c_i what it gives log a_i and takes from c_j what it gives log k_j.
    dlog_decay = None
    if after is not None:
        dcumulative = (part.groups * dgroups).sum(3) - part.k * dkeys
        dcumulative[..., -1, :] += (adjoint.ends * after).sum(-1)
        dlog_decay = dcumulative.flip(3).cumsum(3).flip(3)
    if part.beta is not None:
        dkeys = dkeys + dgroups[:, :, :, sets]
    return dgroups[:, :, :, :sets], dkeys, dv, dlog_decay, dbeta


@torch.library.custom_op("saccade::scan_chunk", mutates_args=())
def scan_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor, scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs `[B, S, R, N, E]` in q's dtype and the state after the last token; shapes as in the module docstring."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    state = state.clone(memory_format=torch.contiguous_format)
    with torch.autocast(q.device.type, enabled=False):
        for span in _ranges(k.shape[2], chunk):
            part = _part(q, k, v, log_decay, beta, scale, span)
            solved, state = _solve(part, state)
            out[:, :, :, span[0] : span[1]] = _read(part, solved, q.shape[2])
    return out, state


@scan_chunk.register_fake
def _(q, k, v, log_decay, beta, state, scale, chunk):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG001
    return q.new_empty(*q.shape[:-1], v.shape[-1]), state.new_empty(state.shape)


@torch.library.custom_op("saccade::scan_chunk_backward", mutates_args=())
def scan_chunk_backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor, scale: float,
    chunk: int, decay_gradient: bool, dout: Tensor, dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay, beta and state; of an absent log_decay or beta, without elements.

    That of log_decay is 0 unless `decay_gradient`.
    """
    dtype = accumulation_dtype(q.dtype)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dlog_decay = k.new_zeros(0) if log_decay is None else log_decay.new_zeros(log_decay.shape)
    dbeta = k.new_zeros(0) if beta is None else beta.new_empty(beta.shape)
    dstate = dstate.to(dtype).clone(memory_format=torch.contiguous_format)
    spans = _ranges(k.shape[2], chunk)
    with torch.autocast(q.device.type, enabled=False):
        states = [state]
        for span in spans[:-1]:
            states.append(_solve(_part(q, k, v, log_decay, beta, scale, span), states[-1])[1])
        for span, before in zip(reversed(spans), reversed(states), strict=False):
            part = _part(q, k, v, log_decay, beta, scale, span)
            solved, after = _solve(part, before)
            cut = dout[:, :, :, span[0] : span[1]].to(dtype).unflatten(3, (-1, span[2])).transpose(2, 3)
            adjoint, dstate = _reverse(part, solved, cut, dstate)
            afters = torch.cat([solved.starts[:, :, 1:], after.unsqueeze(2)], 2) if decay_gradient else None
            grads = _gradients(part, solved, adjoint, cut, afters)
            dq[:, :, :, span[0] : span[1]] = grads[0].transpose(2, 3).flatten(3, 4) * scale
            dk[:, :, span[0] : span[1]] = grads[1].flatten(2, 3)
            dv[:, :, span[0] : span[1]] = grads[2].flatten(2, 3)
            if log_decay is not None and grads[3] is not None:
                into = dlog_decay if log_decay.shape[2] == 1 else dlog_decay[:, :, span[0] : span[1]]
                into += grads[3].flatten(2, 3).sum_to_size(into.shape).to(into.dtype)
            if grads[4] is not None:
                dbeta[:, :, span[0] : span[1]] = grads[4].flatten(2, 3)
    return dq, dk, dv, dlog_decay, dbeta, dstate


@scan_chunk_backward.register_fake
def _(q, k, v, log_decay, beta, state, scale, chunk, decay_gradient, dout, dstate):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG001
    dlog_decay = k.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape)
    dbeta = k.new_empty(0) if beta is None else beta.new_empty(beta.shape)
    dq, dk, dv, dstart = (x.new_empty(x.shape) for x in (q, k, v, state))
    return dq, dk, dv, dlog_decay, dbeta, dstart


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG001
    *tensors, ctx.scale, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout, dstate):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    q, k, v, log_decay, beta, state = ctx.saved_tensors
    wanted = log_decay is not None and ctx.needs_input_grad[3]
    grads = scan_chunk_backward(q, k, v, log_decay, beta, state, ctx.scale, ctx.chunk, wanted, dout, dstate)
    given = (True, True, True, log_decay is not None, beta is not None, True)
    return (*(grad if there else None for grad, there in zip(grads, given, strict=True)), None, None)


scan_chunk.register_autograd(_backward, setup_context=_setup)


def scan_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token (N = 1), for decoding: the recurrence itself in plain, differentiable PyTorch."""
    dtype = accumulation_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        if log_decay is not None:
            state = state * log_decay[:, :, 0].to(dtype).exp()[..., None]
        key, value = k[:, :, 0].to(dtype), v[:, :, 0].to(dtype)
        if beta is not None:
            value = (value - (key[:, :, None] @ state)[:, :, 0]) * beta.to(dtype)
        state = state + key[..., None] * value[:, :, None]
        out = (q[:, :, :, 0].to(dtype) * scale) @ state
    return out[:, :, :, None].to(q.dtype), state
