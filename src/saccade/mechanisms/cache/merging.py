"""Tokens melted into others, for policies that merge what they would otherwise evict."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.mechanisms.cache.checks import check_merge, check_slots
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.weights import SCORE_ELEMENTS
from saccade.ops.checks import accumulation_dtype


@torch.no_grad()
def nearest_kept(store: KVStore, kept: Tensor) -> tuple[Tensor, Tensor]:
    """For each slot that goes the one that stays whose key points most nearly where its own does.

    Likenesses are taken in bounded chunks of the slots that go.

    Args:
        store: With tokens.
        kept: Bool `[B, G, n]`, the slots that stay, at least one in each head.

    Returns:
        int64 `[B, G, n]`, a slot that stays (its own number for one that does itself, and past a head's length), and
        the cosine of the two keys, fp32 (fp64 for fp64), 1 for slots that stay; ties go to the earlier slot.

    Raises:
        ValueError: If `kept` is not bool or not of that shape, or a head with tokens keeps none.
    """
    present = store.present
    check_slots("kept", kept, present, torch.bool)
    kept = kept & present
    counts = kept.sum(-1)
    if bool(((counts == 0) & (store.lengths > 0)).any()):
        raise ValueError(f"kept in heads with {counts.tolist()} slots that stay: expected at least one in each head")
    keys = torch.nn.functional.normalize(store.keys.to(accumulation_dtype(store.dtype)), dim=-1)
    own = torch.arange(len(store), device=kept.device).expand_as(kept)
    into, likeness = own.clone(), torch.ones_like(keys[..., 0])
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)  # those that stay, then the others
    most, least = int(counts.max()), int(counts.min())
    stay, real = order[..., :most], own[..., :most] < counts[..., None]
    towards = _rows(keys, stay).transpose(-1, -2)
    size = max(1, SCORE_ELEMENTS // max(1, most * counts.numel()))
    for going in order[..., least:].split(size, -1):
        cosines = (_rows(keys, going) @ towards).masked_fill(~real[:, :, None], -torch.inf)
        best = cosines.max(-1)
        into.scatter_(2, going, stay.gather(2, best.indices))
        likeness.scatter_(2, going, best.values)
    fixed = kept | ~present
    return torch.where(fixed, own, into), likeness.masked_fill(fixed, 1.0)


def _rows(x: Tensor, slots: Tensor) -> Tensor:
    """Rows `[B, G, K, D]` of `x` `[B, G, n, D]`."""
    return x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[3]))


def merge_slots(store: KVStore, into: Tensor, weights: Tensor | None = None, divisors: Tensor | None = None) -> None:
    """Slots that take others in become the weighted mean of themselves and those; the others are evicted.

    Args:
        store: Changed in place. Positions and stats are those of the slots that stay.
        into: int64 `[B, G, n]`, for each slot the one that takes it in; its own number to stay.
        weights: `[B, G, n]`, above 0; None for the same for all.
        divisors: `[B, G, n]`, what the weighted sum in a slot that stays is divided by; None for the sum of the
            weights, which makes it a mean. With divisors weights may have any sign.

    Raises:
        ValueError: If a shape or dtype is wrong, or a slot that takes others in is not there or does not stay.
    """
    check_merge(store, into, weights)
    present = store.present
    if divisors is not None:
        check_slots("divisors", divisors, present, divisors.dtype)
    wide = accumulation_dtype(store.dtype)
    share = (present if weights is None else weights.masked_fill(~present, 0.0)).to(wide)
    target = into.masked_fill(~present, 0)
    total = torch.zeros_like(share).scatter_add_(2, target, share) if divisors is None else divisors.to(wide)
    members = torch.zeros_like(into).scatter_add_(2, target, present.to(into.dtype))
    means = []
    for x in (store.keys, store.values):
        pooled = torch.zeros_like(x, dtype=wide)
        pooled.scatter_add_(2, target[..., None].expand_as(x), x.to(wide) * share[..., None])
        means.append((pooled / total[..., None]).to(x.dtype))
    store.overwrite(members > 1, *means)
    store.evict(into == torch.arange(into.shape[2], device=into.device))


__all__ = ["merge_slots", "nearest_kept"]
