"""`decode_scores`: what a few queries make of every stored key, for whoever needs the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops.attend.native import unusable
from saccade.ops.attend.validate import check_scale
from saccade.ops.checks import accumulation_dtype, resolve_scale
from saccade.ops.decode_attend.api import check_cache
from saccade.ops.decode_attend.native import engine_pages
from saccade.ops.dispatch import Implementation, choose
from saccade.types import KVPages

Call = Mapping[str, Any]


def _refuses(call: Call) -> str | None:
    """Why the engine cannot serve the call, or None."""
    return "the problem is empty" if 0 in (*call["q"].shape, call["cache"].longest) else unusable(call["q"])


def _run_cpu(call: Call) -> Tensor:
    """The C++ engine reads pages in place."""
    cache: KVPages = call["cache"]
    return cpu.decode_scores(call["q"], cache.k, engine_pages(cache), call["scale"])


def _run_dense(call: Call, dtype: torch.dtype) -> Tensor:
    """Keys made dense, one product."""
    q, cache = call["q"], call["cache"]
    keys = cache.to_dense(dtype)[0]
    tall = q.to(dtype).unflatten(1, (keys.shape[1], -1)).flatten(2, 3) * call["scale"]
    return _hidden((tall @ keys.mT).view(*q.shape[:3], keys.shape[2]), cache)


def _run_reference(call: Call) -> Tensor:
    """In fp64, one query head after the other."""
    q, cache = call["q"].double(), call["cache"]
    keys = cache.to_dense(torch.float64)[0]
    share = q.shape[1] // keys.shape[1]
    heads = [call["scale"] * q[:, h] @ keys[:, h // share].mT for h in range(q.shape[1])]
    return _hidden(torch.stack(heads, 1), cache).to(accumulation_dtype(call["q"].dtype))


def _hidden(scores: Tensor, cache: KVPages) -> Tensor:
    """-inf where a query does not see: past its own place, which is before its head's end."""
    heads, queries, slots = scores.shape[1:]
    lengths = cache.lengths.repeat_interleave(heads // cache.lengths.shape[1], 1)[..., None]
    place = lengths - queries + torch.arange(queries, device=scores.device)
    return scores.masked_fill(torch.arange(slots, device=scores.device) > place[..., None], -torch.inf)


IMPLEMENTATIONS = {
    "cpu": Implementation("cpu", _run_cpu, _refuses),
    "eager": Implementation("eager", lambda call: _run_dense(call, accumulation_dtype(call["q"].dtype))),
    "reference": Implementation("reference", _run_reference),
}
"""By preference."""


@torch.no_grad()
def decode_scores(q: Tensor, cache: KVPages, *, scale: float | None = None, impl: str = "auto") -> Tensor:
    """`scale` q k^T of the newest tokens and all that is stored, as `decode_attend` computes it on its way.

    Args:
        q: `[B, H, M, D]`, floating point: the queries of the last M places of each head.
        cache: The keys, and values that are not looked at; floats of q's dtype, or codes.
        scale: Factor on q k^T; None means D^-0.5.
        impl: "auto", "cpu" (the C++ engine), "eager" or "reference".

    Returns:
        `[B, H, M, n]` with n the greatest length, fp32 (fp64 for fp64); -inf for places after the query's own.

    Raises:
        ValueError: If an argument does not fit the others, or `impl` cannot run the call.
    """
    check_cache(q, cache)
    check_scale(scale)
    call = {"q": q, "cache": cache, "scale": resolve_scale(scale, q.shape[3])}
    chosen, _ = choose("decode_scores", IMPLEMENTATIONS, impl, call)
    cache.validate()
    scores: Tensor = chosen.run(call)
    return scores


__all__ = ["IMPLEMENTATIONS", "decode_scores"]
