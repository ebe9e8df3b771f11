"""A layer's attention where its keys and values go to a `PagedCache`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.mechanisms.cache.base import CachePolicy, attend_chosen, evict_after
from saccade.mechanisms.cache.store import KVStore
from saccade.ops import attend
from saccade.plug.cache import PagedLayer
from saccade.plug.choices import DENSE, Choice
from saccade.plug.masks import MaskPlan, Reading, UnreadableMaskError
from saccade.plug.route import Extras, Route, join, split
from saccade.types import AttentionOutput

LATER = "earlier tokens are in a PagedCache, and its policy says what is read of them"
"""Why later parts of a text, another turn of a chat among them, attend densely to themselves and to what is read."""

ALL_DENSE = Route(Choice("all", DENSE), None)
"""What a layer does that the recipe does not name."""

SERVED = "expected causal attention over one sequence per row, perhaps padded, with a PagedCache"


def attend_cached(
    layer: PagedLayer, q: Tensor, k: Tensor, v: Tensor, mask: Any, extras: Extras, window: int | None,
    routes: tuple[Route, ...], prefill: Callable[[], Tensor],
) -> Tensor:  # fmt: skip
    """Attention of new tokens over themselves and the layer's store, which takes them in and is then cut.

    Args:
        layer: Of the cache.
        q: `[B, H, M, D]`.
        k: `[B, G, M, D]`, the new tokens only.
        v: `[B, G, M, E]`.
        mask: What transformers passed.
        extras: What the model adds to attention.
        window: Tokens that a query of this layer sees back, itself included, or None.
        routes: The recipe's, for this phase.
        prefill: Runs the recipe on new tokens alone, `[B, H, M, E]`.

    Returns:
        `[B, H, M, E]`.

    Raises:
        ValueError: If the cache cannot serve the call.
    """
    store, policy, step = layer.store, layer.policy, layer.step
    reading, queries = _read(mask, q), q.shape[2]
    prompt, governed = store.empty and queries > 1, window is None
    if prompt or queries == 1:
        _refuse_mechanism(routes, policy, prompt)
    if governed and policy.reads_prompts and not any(route.changes for route in routes):
        prompt = False
    step.layer, step.scale, step.softcap, step.lse = layer.number, extras.scale, extras.softcap, None
    store.append(k, v, _present(reading, queries))
    layer.length, layer.pending = layer.length + queries, queries
    if prompt and governed and policy.needs_lse:
        out, step.lse = _dense(routes, q, k, v, reading, extras)
    elif prompt:
        out = prefill()
    else:
        limits: dict[str, Any] = {"scale": extras.scale, "softcap": extras.softcap}
        if window is not None and queries > 1:
            limits["window"] = (window - 1, 0)
        elif window is not None:
            _slide(store, window)
        chosen = policy.read(q, store, step) if governed else None
        out, step.lse = _with_sinks(attend_chosen(q, store, chosen, **limits), extras.sinks)
    held = int(store.lengths.sum())
    if window is None:
        evict_after(policy, q, store, step)
    else:
        _slide(store, window)
    layer.pending, layer.cut = 0, layer.length if int(store.lengths.sum()) < held else layer.cut
    return out


def _slide(store: KVStore, window: int) -> None:
    """Evict what a window of the layer's own hides from its last token and all later ones."""
    if len(store) > window:
        store.evict(store.positions >= store.seen[:, None, None] - window)


def _with_sinks(result: AttentionOutput, sinks: Tensor | None) -> AttentionOutput:
    """The result with a sink's logit `[H]` beside the scores of each row."""
    out, lse = result
    if sinks is None or lse is None:
        return result
    joint = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return AttentionOutput(out * torch.exp(lse - joint)[..., None].to(out.dtype), joint)


def _dense(
    routes: tuple[Route, ...], q: Tensor, k: Tensor, v: Tensor, reading: Reading, extras: Extras
) -> AttentionOutput:
    """A prompt on Saccade's engine, which says the log-sum-exp that the policy needs."""
    geometry, routes = reading.geometry, tuple(route.at(k.shape[2]) for route in routes) or (ALL_DENSE,)
    done: list[Any] = [
        attend(
            *route.round(*parts), causal=True, q_segments=geometry.q_segments, kv_segments=geometry.kv_segments,
            softcap=extras.softcap, sinks=of_heads.sinks, scale=extras.scale, return_lse=True,
        )
        for route, parts, of_heads in split(routes, q, k, v, extras)
    ]  # fmt: skip
    return AttentionOutput(join(routes, [out.to(q.dtype) for out, _ in done]), join(routes, [lse for _, lse in done]))


def _read(mask: Any, q: Tensor) -> Reading:
    """Causality and padding; refused where a mask says more than these."""
    if not isinstance(mask, MaskPlan):
        raise ValueError(f"attention_mask of the caller's own ({type(mask).__name__}): {SERVED}")
    try:
        reading = mask.read(q.device)
    except UnreadableMaskError as reason:
        raise ValueError(f"attention_mask: {reason}: {SERVED}") from reason
    if not reading.geometry.causal:
        raise ValueError(f"is_causal=False: {SERVED}")
    segments = reading.geometry.kv_segments
    if segments is not None and bool((segments > 0).any()):
        raise ValueError(f"position_ids: packed sequences, or attention in chunks: {SERVED}")
    return reading


def _present(reading: Reading, queries: int) -> Tensor | None:
    """Which of the new tokens are not padding, bool `[B, M]`; None for all."""
    segments = reading.geometry.q_segments
    if segments is None or bool((segments[:, -queries:] >= 0).all()):
        return None
    return segments[:, -queries:] >= 0


def _refuse_mechanism(routes: tuple[Route, ...], policy: CachePolicy, prompt: bool) -> None:
    """Refuse a recipe's mechanism where the policy says what is read, or needs all the attention weights."""
    for name in [route.choice.mechanism for route in routes if route.mechanism is not None]:
        if not prompt:
            raise ValueError(
                f"mechanism={name!r}: expected dense attention in the recipe where earlier tokens are in a PagedCache, "
                "whose policy says what is read"
            )
        if policy.needs_lse:
            raise ValueError(
                f"mechanism={name!r}: expected dense attention in the recipe's prefill, {policy!r} needs all its "
                "weights"
            )
