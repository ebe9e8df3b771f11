"""Tokens melted into others, for policies that merge what they would otherwise evict."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.mechanisms.cache.checks import check_merge, check_slots
from saccade.mechanisms.cache.pagetable import Slots
from saccade.mechanisms.cache.reading import score_stored
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.weights import SCORE_ELEMENTS
from saccade.ops.checks import accumulation_dtype

EPSILON = 1e-12
"""Least length of a key that a cosine divides by."""


@torch.no_grad()
def nearest_kept(store: KVStore, kept: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each slot that goes the one that stays whose key points most nearly where its own does.

    Likenesses are taken in bounded chunks of the slots that go; where no head loses more than one token, as while
    decoding, keys are read in place.

    Args:
        store: With tokens.
        kept: Bool `[B, G, n]`, the slots that stay, at least one in each head.
        lengths: `[B, G, n]`, those of the keys if they are known; None to take them.

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
    lengths = key_lengths(store) if lengths is None else lengths
    own = torch.arange(len(store), device=kept.device).expand_as(kept)
    into, likeness = own.clone(), torch.ones_like(lengths)
    most, least = int(counts.max()), int(counts.min())
    if len(store) - least == 1:
        going = (present & ~kept).to(torch.uint8).argmax(-1, keepdim=True)
        scores = score_stored(store.gather(going)[0], store, scale=1.0)[:, :, 0] / lengths.clamp(min=EPSILON)
        best = scores.masked_fill(~kept, -torch.inf).max(-1, keepdim=True)
        into.scatter_(2, going, best.indices)
        likeness.scatter_(2, going, best.values / lengths.gather(2, going).clamp(min=EPSILON))
    else:
        order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)  # those that stay, then the others
        keys = store.keys.to(lengths.dtype) / lengths.clamp(min=EPSILON)[..., None]
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


def key_lengths(store: KVStore, known: Tensor | None = None) -> Tensor:
    """L2 norms of keys.

    Args:
        store: With tokens.
        known: `[B, G, n]`, norms taken before, 0 where none was; None for none.

    Returns:
        `[B, G, n]` in fp32 (fp64 for fp64), 0 past a head's length.
    """
    wide = accumulation_dtype(store.dtype)
    unknown = None if known is None else _slots(store.present & (known == 0))
    if known is None or unknown is None or 2 * len(unknown[0]) > known.numel():
        return torch.linalg.vector_norm(store.keys, dim=-1, dtype=wide)
    lengths = known.clone()
    lengths[unknown] = torch.linalg.vector_norm(store.rows(unknown)[0], dim=-1, dtype=wide)
    return lengths


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
    present, wide = store.present, accumulation_dtype(store.dtype)
    if divisors is not None:
        check_slots("divisors", divisors, present, divisors.dtype)
    own = torch.arange(into.shape[2], device=into.device)
    going = _slots(present & (into != own))
    if not len(going[0]):
        return
    taken = torch.zeros_like(present)
    taken[going[0], going[1], into[going]] = True
    hosts = _slots(taken)
    number = torch.zeros_like(into)
    number[hosts] = torch.arange(len(hosts[0]), device=into.device)
    guest_of = number[going[0], going[1], into[going]]
    share = (torch.ones_like(into) if weights is None else weights).to(wide)
    total = share[hosts].index_add(0, guest_of, share[going]) if divisors is None else divisors[hosts].to(wide)
    means = []
    for host, guest in zip(store.rows(hosts), store.rows(going), strict=True):
        pooled = host.to(wide) * share[hosts][:, None]
        pooled.index_add_(0, guest_of, guest.to(wide) * share[going][:, None])
        means.append((pooled / total[:, None]).to(store.dtype))
    store.overwrite(hosts, *means)
    store.evict(into == own)


def _slots(chosen: Tensor) -> Slots:
    """Batch entry, head and slot of what is chosen, bool `[B, G, n]`."""
    entry, head, slot = chosen.nonzero(as_tuple=True)
    return entry, head, slot


__all__ = ["key_lengths", "merge_slots", "nearest_kept"]
