"""What policies that judge keys alone keep between steps: lengths beside the tokens, and a sum of directions."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.mechanisms.cache._derived import Derived, recall
from saccade.mechanisms.cache.forms import TensorForm, counts
from saccade.mechanisms.cache.pagetable import Slots
from saccade.mechanisms.cache.reading import score_stored
from saccade.mechanisms.cache.store import KVStore
from saccade.ops.checks import accumulation_dtype

NORM = "key_norm"
"""The stat that holds the length of a token's key; 0 where it is not known yet."""

LEAST = 1e-12
"""A shorter key has no direction."""

_ANCHOR = "sum of directions"

ANCHOR_FORMS = {
    _ANCHOR: {"sum": TensorForm("B G D", torch.float64), "lengths": counts("B G"), "seen": counts("B", "seen")}
}
"""What `directions_left` keeps."""


def key_norms(store: KVStore) -> Tensor:
    """`||k_j||_2` of every key as it is stored, of which only those are looked at that are new.

    Args:
        store: With tokens and the stat `NORM`.

    Returns:
        `[B, G, n]` in fp32 (fp64 for fp64); 0 past a head's length.
    """
    norms = store.stat(NORM)
    unknown = _slots((norms == 0) & store.present)
    count = len(unknown[0])
    if 4 * count > store.tokens:
        keys = store.keys
        norms = torch.linalg.vector_norm(keys, dim=-1, dtype=accumulation_dtype(keys.dtype))
        store.set_stat(NORM, norms)
    elif count:
        keys = store.rows(unknown)[0]
        norms[unknown] = torch.linalg.vector_norm(keys, dim=-1, dtype=norms.dtype)
        store.table.write(unknown, {NORM: norms[unknown][:, None]})
    return norms


def sum_of_directions(store: KVStore, norms: Tensor) -> Tensor:
    """`sum_j k_j / ||k_j||` over all keys, from that of the step before where `directions_left` has said what stays.

    Args:
        store: With tokens.
        norms: Of its keys, `[B, G, n]`.

    Returns:
        fp64 `[B, G, D]`: adding and taking away for many steps loses nothing that fp32 shows.
    """
    before = recall(store, _ANCHOR)
    if before is None or not _followed(store, before):
        shares = norms.clamp(min=LEAST).reciprocal().masked_fill(~store.present, 0.0)
        return (shares[:, :, None] @ store.keys.to(shares.dtype))[:, :, 0].double()
    new = torch.arange(len(store), device=norms.device) >= before.tensors["lengths"][..., None]
    return before.tensors["sum"] + _directions(store, norms, new & store.present)


def directions_left(store: KVStore, norms: Tensor, total: Tensor, kept: Tensor) -> None:
    """Note `total` without what is about to be evicted: `kept` bool `[B, G, n]` has to go to `evict` next."""
    rest = total - _directions(store, norms, store.present & ~kept)
    left = {"sum": rest, "lengths": kept.sum(-1), "seen": store.seen}
    store.derived[_ANCHOR] = Derived(store.changes + 1, left)


def _followed(store: KVStore, before: Derived) -> bool:
    """Whether `evict` did follow: nothing but what came since is there beside what stayed."""
    came = store.seen - before.tensors["seen"]
    return torch.equal(store.lengths, before.tensors["lengths"] + came[:, None])


def key_products(x: Tensor, store: KVStore) -> Tensor:
    """`x . k_j` with every key, read in place.

    Args:
        x: `[B, G, D]`.
        store: With tokens.

    Returns:
        `[B, G, n]` in fp32 (fp64 for fp64); -inf past a head's length.
    """
    wide = x.to(accumulation_dtype(store.dtype))
    stored = store.dtype if store.storage.dtype is None else store.storage.dtype
    high = wide.to(stored)
    # Rounded to 16 bits x would lose more than keys have: its rest is a query of its own.
    pieces = [high] if stored == wide.dtype else [high, (wide - high.to(wide.dtype)).to(stored)]
    heads = torch.stack(pieces, 2).flatten(1, 2)[:, :, None]
    return score_stored(heads, store, scale=1.0)[:, :, 0].unflatten(1, (-1, len(pieces))).sum(2)


def _directions(store: KVStore, norms: Tensor, which: Tensor) -> Tensor:
    """The sum of `k_j / ||k_j||` over some slots, bool `[B, G, n]`: fp64 `[B, G, D]`."""
    slots = _slots(which)
    directions = store.rows(slots)[0].double() / norms[slots].double().clamp(min=LEAST)[:, None]
    total = directions.new_zeros(*norms.shape[:2], directions.shape[1])
    return total.index_put_(slots[:2], directions, accumulate=True)


def _slots(which: Tensor) -> Slots:
    """The places where bool `[B, G, n]` is True."""
    entry, head, slot = which.nonzero(as_tuple=True)
    return entry, head, slot


__all__ = ["ANCHOR_FORMS", "LEAST", "NORM", "directions_left", "key_norms", "key_products", "sum_of_directions"]
