"""What a store refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saccade.mechanisms.cache.store import KVStore


def check_tokens(store: KVStore, k: Tensor, v: Tensor, present: Tensor | None) -> None:
    """Refuse tokens that do not fit each other or the store."""
    if k.ndim != 4 or v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k of shape {tuple(k.shape)} and v of shape {tuple(v.shape)}: expected [B, G, m, D] and [B, G, m, E]"
        )
    if not store.empty:
        dims = store.dims
        for name, x, dim in (("k", k, dims[0]), ("v", v, dims[1])):
            expected = (*store.lengths.shape, x.shape[2], dim)
            if x.shape != expected or x.dtype != store.dtype or x.device != store.lengths.device:
                raise ValueError(
                    f"{name} of shape {tuple(x.shape)}, {x.dtype} on {x.device}: "
                    f"expected {tuple(expected)}, {store.dtype} on {store.lengths.device}, as stored"
                )
    if present is not None:
        check_slots("present", present, k[:, 0, :, 0], torch.bool)


def check_slots(name: str, x: Tensor, like: Tensor, dtype: torch.dtype) -> None:
    """Refuse what is not of the shape of `like` and of `dtype`."""
    if x.shape != like.shape or x.dtype != dtype:
        raise ValueError(f"{name} of shape {tuple(x.shape)}, {x.dtype}: expected {tuple(like.shape)}, {dtype}")


def check_merge(store: KVStore, into: Tensor, weights: Tensor | None) -> None:
    """Refuse targets that do not exist or do not stay."""
    present = store.present
    check_slots("into", into, present, torch.int64)
    if weights is not None:
        check_slots("weights", weights, present, weights.dtype)
    target = into[present]
    if target.numel() and (int(target.min()) < 0 or bool((into >= store.lengths[..., None])[present].any())):
        raise ValueError(f"into in [{int(target.min())}, {int(target.max())}]: expected slots that hold a token")
    kept = into.clamp(min=0).masked_fill(~present, 0)
    if not bool((into.gather(2, kept) == kept)[present].all()):
        raise ValueError("into: expected slots that stay, one that takes others in is itself merged into another")
