"""Attention weights for policies that look at them, and the best by any score."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.mechanisms.cache.reading import score_stored
from saccade.mechanisms.cache.store import KVStore
from saccade.ops.checks import accumulation_dtype, resolve_scale

if TYPE_CHECKING:
    from saccade.mechanisms.cache.base import Step

SCORE_ELEMENTS = 2**22
"""Most scores that are held at once where weights are looked at."""

FEW_QUERIES = 64
"""Up to so many, keys that are read in place are faster than a copy of them."""


def is_few(queries: int, elements: int) -> bool:
    """Whether `score_stored` serves for so many queries of `elements` scores each."""
    return queries == 1 or (queries <= FEW_QUERIES and queries * elements <= SCORE_ELEMENTS)


def best(scores: Tensor, count: int | Tensor) -> Tensor:
    """The `count` highest of each head, bool `[B, G, n]`; ties go to the earlier slot, -inf is never among them.

    A number for each head is int64 `[B, 1 or G]`.
    """
    slots = scores.shape[-1]
    if isinstance(count, int) and 0 < count < slots:  # all above the last that stays, and as many of its equals
        last = scores.kthvalue(slots - count + 1, dim=-1, keepdim=True).values
        above, level = scores > last, scores == last
        room = count - above.sum(-1, keepdim=True)
        return (above | (level & (level.cumsum(-1) <= room))) & (scores > -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    count = count if isinstance(count, int) else count[..., None]
    among = (torch.arange(scores.shape[-1], device=scores.device) < count).expand_as(scores)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, among) & (scores > -torch.inf)


@torch.no_grad()
def received_attention(q: Tensor, store: KVStore, step: Step) -> Tensor:
    """Softmax attention that each slot receives, summed over all queries of a call and the query heads that share it.

    Args:
        q: `[B, H, M, D]`, the queries of the last M slots.
        store: With these slots.
        step: With the rows' `lse`.

    Returns:
        `[B, G, n]` in fp32 (fp64 for fp64), computed in bounded chunks of queries.

    Raises:
        ValueError: If there is no `lse`.
    """
    if step.lse is None:
        raise ValueError("step.lse=None: expected the log-sum-exp of dense attention")
    known = step.known[1] if step.known is not None and step.known[0] is q else {}
    if store.storage not in known:
        known[store.storage] = _received_attention(q, store, step, step.lse)
    return known[store.storage]


def _received_attention(q: Tensor, store: KVStore, step: Step, lse: Tensor) -> Tensor:
    batch, heads, queries, dim = q.shape
    groups, slots, dtype = store.lengths.shape[1], len(store), accumulation_dtype(q.dtype)
    rows = lse.masked_fill(lse == -torch.inf, torch.inf).to(dtype)  # a row that sees nothing gives nothing
    if is_few(queries, batch * heads * slots):
        weights = _capped(score_stored(q, store, scale=step.scale), step).sub_(rows[..., None]).exp_()
        return weights.unflatten(1, (groups, -1)).sum((2, 3))
    keys = store.keys.to(dtype).transpose(-1, -2)
    wide = q.reshape(batch, groups, heads // groups, queries, dim).to(dtype) * resolve_scale(step.scale, dim)
    rows = rows.view(batch, groups, heads // groups, queries, 1)
    slot = torch.arange(slots, device=q.device)
    place = torch.arange(queries, device=q.device) + store.lengths[..., None] - queries
    total = torch.zeros(batch, groups, slots, dtype=dtype, device=q.device)
    size = max(1, SCORE_ELEMENTS // max(1, batch * heads * slots))
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        seen = slots - queries + stop  # slots that some query of these sees
        scores = (wide[..., start:stop, :].flatten(2, 3) @ keys[..., :seen]).unflatten(2, (-1, stop - start))
        weights = _capped(scores, step).sub_(rows[..., start:stop, :]).exp_()
        hidden = slot[:seen] > place[:, :, None, start:stop, None]
        total[..., :seen] += weights.masked_fill_(hidden, 0.0).sum((2, 3))
    return total


def _capped(scores: Tensor, step: Step) -> Tensor:
    """Scores as the model's attention has them; what was hidden (-inf) still is."""
    if step.softcap is None:
        return scores
    return (step.softcap * torch.tanh(scores / step.softcap)).masked_fill_(scores == -torch.inf, -torch.inf)


__all__ = ["SCORE_ELEMENTS", "best", "is_few", "received_attention"]
