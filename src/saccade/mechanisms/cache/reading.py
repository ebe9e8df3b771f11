"""Attention over a store, read in place where the engine can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.mechanisms.cache._packed import PackedStore, attend_tiers
from saccade.mechanisms.cache.remote import RemoteStore
from saccade.mechanisms.cache.sharing import SharedKeyStore
from saccade.mechanisms.cache.sharing_attention import attend_shared
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.tiered import TieredStore, attend_tiered
from saccade.ops import decode_attend, decode_scores
from saccade.ops.checks import accumulation_dtype, resolve_scale
from saccade.types import AttentionOutput, KVPages

COPIED = 2**22
"""Most numbers of keys that are copied at once: what is larger comes fresh from the system each time, page by page."""


def attend_stored(
    q: Tensor,
    store: KVStore,
    slots: Tensor | None = None,
    *,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> AttentionOutput:
    """Softmax attention of the newest tokens over what is stored, causal: the queries are those of the last M slots.

    Args:
        q: `[B, H, M, D]`.
        store: With at least these M tokens.
        slots: int64 `[B, G or H, K]`, what the heads attend to instead of everything; -1 is an empty place.
        window: As in `decode_attend`, in slots.
        softcap: As in `decode_attend`.
        scale: Factor on q k^T; None means D^-0.5.
        impl: Implementation of `decode_attend`.

    Returns:
        `out` `[B, H, M, E]` in q's dtype, and `lse` `[B, H, M]`.

    Raises:
        ValueError: If shapes do not fit.
    """
    if isinstance(store, RemoteStore):
        if slots is not None or window is not None:
            raise ValueError(f"slots or window={window}: expected neither over {store!r} in an attention worker")
        return store.attend(q, scale=scale, softcap=softcap, impl=impl)
    if isinstance(store, SharedKeyStore):
        if slots is None and window is None:
            return attend_shared(q, store, scale=scale, softcap=softcap, impl=impl)
        q = store.follow(q)
    dtype, channels, query = q.dtype, store.channels, q
    scale = q.shape[3] ** -0.5 if scale is None else scale
    cache = None
    if store.storage.bits == 2 or (isinstance(store, TieredStore) and (q.shape[2] > 1 or window is not None)):
        cache, channels = KVPages.from_dense(store.keys, store.values, lengths=store.lengths), None
    if channels is not None:
        q = _per_head(q, channels[0])
    options: dict[str, Any] = {"slots": slots, "softcap": softcap, "scale": scale, "impl": impl}
    if isinstance(store, TieredStore) and cache is None:
        out, lse = attend_tiered(q, store, **options)
    else:
        cache = store.pages() if cache is None else cache
        q = q if cache.bits is not None else q.to(cache.k.dtype)
        out, lse = decode_attend(q, cache, window=window, return_lse=True, **options)
    out = out if channels is None else _per_head(out, channels[1])
    result = AttentionOutput(out.to(dtype), lse)
    if isinstance(store, PackedStore) and store.tokens > int(store.lengths.sum()):
        if slots is not None or window is not None:
            raise ValueError(f"slots or window={window}: expected neither over {store!r}, which has packed tokens")
        return attend_tiers(query, store, result, softcap=softcap, scale=scale, impl=impl)
    return result


def score_stored(q: Tensor, store: KVStore, *, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Scores of a few of the newest tokens and all that is stored, whose keys are read in place.

    Args:
        q: `[B, H, M, D]`, the queries of the last M slots.
        store: With at least these M tokens, none of them packed in groups.
        scale: Factor on q k^T; None means D^-0.5.
        impl: Implementation of `decode_scores`.

    Returns:
        `[B, H, M, n]` in fp32 (fp64 for fp64); -inf past a head's length and for what comes after the query.
    """
    scale = resolve_scale(scale, q.shape[3])
    if store.storage.bits == 2 or isinstance(store, TieredStore):
        keys = store.keys
        cache = KVPages.from_dense(keys, keys, lengths=store.lengths)
    else:
        cache = store.pages()
        q = q if store.channels is None else _per_head(q, store.channels[0])
    return decode_scores(q if cache.bits is not None else q.to(cache.k.dtype), cache, scale=scale, impl=impl)


@dataclass(frozen=True, eq=False)
class WeightedSlots:
    """Slots for one query per head, each with a number added to its score: the log of what its weight is multiplied by.

    Args:
        slots: int64 `[B, H, K]`; -1 is an empty place.
        bias: `[B, H, K]`, floating point, or what makes it for some query heads: of their products `q k^T`
            `[B, h, K]`, which are known once the keys are read, and of which heads these are.
    """

    slots: Tensor
    bias: Tensor | Callable[[Tensor, slice], Tensor]


def attend_weighted(
    q: Tensor, store: KVStore, chosen: WeightedSlots, *, scale: float | None = None, softcap: float | None = None,
    **options: Any,  # noqa: ARG001  there is one implementation
) -> AttentionOutput:  # fmt: skip
    """Softmax of `q k^T scale + bias` over listed slots, whose keys and values are copied: engines know no such bias.

    Args:
        q: `[B, H, 1, D]`.
        store: With tokens.
        chosen: Which, and their bias.
        scale: Factor on q k^T; None means D^-0.5.
        softcap: Scores become `softcap * tanh(score / softcap)` before the bias.
        **options: Not used.

    Returns:
        `out` `[B, H, 1, E]` in q's dtype, and `lse` `[B, H, 1]`; 0 and -inf where a list is empty.
    """
    scale, heads = resolve_scale(scale, q.shape[3]), q.shape[1]
    some = max(1, COPIED // max(1, len(q) * chosen.slots.shape[2] * q.shape[3]))
    slices = [slice(first, min(first + some, heads)) for first in range(0, heads, some)]
    parts = [_weighted(q, store, chosen, rows, scale, softcap) for rows in slices]
    return AttentionOutput(torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1))


def _weighted(
    q: Tensor, store: KVStore, chosen: WeightedSlots, rows: slice, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Of some query heads."""
    dtype, slots = accumulation_dtype(q.dtype), chosen.slots[:, rows]
    empty = slots < 0
    filler = slots.amax(-1, keepdim=True)  # one of the list: what is not listed may be anything
    entry = torch.arange(len(q), device=q.device)[:, None, None]
    head = torch.arange(rows.start, rows.stop, device=q.device) // (q.shape[1] // store.lengths.shape[1])
    keys, values = store.rows((entry, head[:, None], slots.where(~empty, filler).clamp(min=0)))
    products = (keys.to(dtype) @ q[:, rows].to(dtype).transpose(-1, -2))[..., 0]
    bias = chosen.bias[:, rows] if isinstance(chosen.bias, Tensor) else chosen.bias(products, rows)
    scores = products * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + bias.to(dtype)).masked_fill(empty, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse).masked_fill(empty | (lse == -torch.inf), 0.0)
    out = (weights[:, :, None] @ values.to(dtype)).masked_fill(lse[..., None] == -torch.inf, 0.0)
    return out.to(q.dtype), lse


def _per_head(x: Tensor, factors: Tensor) -> Tensor:
    """`x` `[B, H, M, D]` times `factors` `[B, G, D]`, in the dtype of x."""
    return x * factors.repeat_interleave(x.shape[1] // factors.shape[1], 1)[:, :, None]


__all__ = ["WeightedSlots", "attend_stored", "attend_weighted", "score_stored"]
