"""Tokens melted into others, for policies that merge what they would otherwise evict."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.mechanisms.cache.checks import check_merge
from saccade.mechanisms.cache.store import KVStore
from saccade.ops.checks import accumulation_dtype


def merge_slots(store: KVStore, into: Tensor, weights: Tensor | None = None) -> None:
    """Slots that take others in become the weighted mean of themselves and those; the others are evicted.

    Args:
        store: Changed in place. Positions and stats are those of the slots that stay.
        into: int64 `[B, G, n]`, for each slot the one that takes it in; its own number to stay.
        weights: `[B, G, n]`, above 0; None for the same for all.

    Raises:
        ValueError: If a shape or dtype is wrong, or a slot that takes others in is not there or does not stay.
    """
    check_merge(store, into, weights)
    present = store.present
    wide = accumulation_dtype(store.dtype)
    share = (present if weights is None else weights.masked_fill(~present, 0.0)).to(wide)
    target = into.masked_fill(~present, 0)
    total = torch.zeros_like(share).scatter_add_(2, target, share)
    members = torch.zeros_like(into).scatter_add_(2, target, present.to(into.dtype))
    means = []
    for x in (store.keys, store.values):
        pooled = torch.zeros_like(x, dtype=wide)
        pooled.scatter_add_(2, target[..., None].expand_as(x), x.to(wide) * share[..., None])
        means.append((pooled / total[..., None]).to(x.dtype))
    store.overwrite(members > 1, *means)
    store.evict(into == torch.arange(into.shape[2], device=into.device))


__all__ = ["merge_slots"]
