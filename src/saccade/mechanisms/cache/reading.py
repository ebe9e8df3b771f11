"""Attention over a store, read in place where the engine can."""

from __future__ import annotations

from torch import Tensor

from saccade.mechanisms.cache._packed import PackedStore, attend_tiers
from saccade.mechanisms.cache.store import KVStore
from saccade.ops import decode_attend
from saccade.types import AttentionOutput, KVPages


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
    dtype, channels, query = q.dtype, store.channels, q
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if store.storage.bits == 2:
        cache, channels = KVPages.from_dense(store.keys, store.values, lengths=store.lengths), None
    else:
        cache = store.pages()
    if channels is not None:
        q = _per_head(q, channels[0])
    q = q if cache.bits is not None else q.to(cache.k.dtype)
    out, lse = decode_attend(
        q, cache, slots=slots, window=window, softcap=softcap, scale=scale, return_lse=True, impl=impl
    )
    out = out if channels is None else _per_head(out, channels[1])
    result = AttentionOutput(out.to(dtype), lse)
    if isinstance(store, PackedStore) and store.tokens > int(store.lengths.sum()):
        if slots is not None or window is not None:
            raise ValueError(f"slots or window={window}: expected neither over {store!r}, which has packed tokens")
        return attend_tiers(query, store, result, softcap=softcap, scale=scale, impl=impl)
    return result


def _per_head(x: Tensor, factors: Tensor) -> Tensor:
    """`x` `[B, H, M, D]` times `factors` `[B, G, D]`, in the dtype of x."""
    return x * factors.repeat_interleave(x.shape[1] // factors.shape[1], 1)[:, :, None]


__all__ = ["attend_stored"]
