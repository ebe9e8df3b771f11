"""Oracle of `decode_attend`: the cache made dense and the whole score matrix in one go."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.attend.reference import reference_attention
from saccade.types import KVPages


def reference_decode(
    q: Tensor, cache: KVPages, left: int, right: int, softcap: float | None, scale: float, slots: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`out` `[B, H, M, E]` in q's dtype and `lse` `[B, H, M]`."""
    k, v = cache.to_dense(torch.float64 if q.dtype == torch.float64 else torch.float32)
    share = q.shape[1] // k.shape[1]
    lengths = cache.lengths.repeat_interleave(share, 1)[:, :, None, None]
    key = torch.arange(k.shape[2], device=q.device)
    place = torch.arange(q.shape[2], device=q.device)[:, None] + lengths - q.shape[2]
    mask = (key < lengths).expand(*q.shape[:3], -1)
    if left >= 0:
        mask = mask & (key >= place - left)
    if right >= 0:
        mask = mask & (key <= place + right)
    if slots is not None:
        listed = torch.zeros(*slots.shape[:2], k.shape[2] + 1, dtype=torch.bool, device=q.device)
        listed.scatter_(2, torch.where((slots < 0) | (slots >= k.shape[2]), k.shape[2], slots), value=True)
        mask = mask & listed[..., :-1].repeat_interleave(q.shape[1] // slots.shape[1], 1)[:, :, None]
    return reference_attention(q, k, v, mask, scale=scale, softcap=softcap)
