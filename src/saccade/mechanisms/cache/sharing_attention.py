"""Attention over a `SharedKeyStore`: own scores for the first tokens, those of a cluster's leader for all others."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from saccade.mechanisms.cache.sharing import SharedKeyStore
from saccade.ops import attend, decode_attend
from saccade.ops.checks import accumulation_dtype, resolve_scale
from saccade.types import AttentionOutput

WIDE = 4
"""Most heads of a cluster whose values are weighed side by side: more leave the processor's caches."""


class FirstRows(NamedTuple):
    """Rows of a call that attend as they would alone: row `row` of sequence `entry`, int64 `[R]`; results by head."""

    entry: Tensor
    row: Tensor
    out: Tensor
    lse: Tensor


def attend_shared(
    q: Tensor, store: SharedKeyStore, *, scale: float | None = None, softcap: float | None = None, impl: str = "auto"
) -> AttentionOutput:
    """Softmax attention of the newest tokens over all that is stored, causal; finds clusters that can now be found.

    Args:
        q: `[B, H, M, D]`, the queries of the last M slots.
        store: With at least these tokens; where a sequence's first tokens are now all there, its clusters are formed
            from them and the keys of heads that follow others are freed.
        scale: Factor on q k^T; None means D^-0.5.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        impl: Implementation of the engines.

    Returns:
        `out` `[B, H, M, E]` in q's dtype, and `lse` `[B, H, M]`: of heads that follow, their leader's.
    """
    scale = resolve_scale(scale, q.shape[3])
    first = form_clusters(q, store, scale, softcap, impl)
    if q.shape[2] > 1 and len(store) <= q.shape[2]:
        out, lse = _attend_prompt(q, store, scale, softcap, impl)
    else:
        stored = store.follow(q).to(store.dtype)
        out, lse = _both(decode_attend(stored, store.pages(), scale=scale, softcap=softcap, return_lse=True, impl=impl))
    out = out.to(q.dtype)
    if first is not None:
        out[first.entry, :, first.row], lse[first.entry, :, first.row] = first.out.to(q.dtype), first.lse.to(lse.dtype)
    return AttentionOutput(out, lse)


@torch.no_grad()
def form_clusters(
    q: Tensor, store: SharedKeyStore, scale: float, softcap: float | None, impl: str = "auto"
) -> FirstRows | None:
    """Note the queries of first tokens; where they are all there let heads share keys.

    Args:
        q: `[B, H, M, D]`, the queries of the last M slots; those that were noted before count once.
        store: With these tokens.
        scale: Factor on q k^T.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        impl: Implementation of the engines.

    Returns:
        Rows of this call that are of first tokens whose heads share keys from now on; None if there are none.
    """
    if not store.waiting:
        return None
    count, warmup, batch = q.shape[2], store.grouping.warmup, len(q)
    if store.early is None:
        store.early = q.new_zeros(batch, q.shape[1], warmup, q.shape[3])
    place, begin = torch.arange(warmup, device=q.device), (store.seen - count)[:, None]
    row = place - begin
    here = (row >= 0) & (row < count) & ~store.grouped[:, None]
    rows = q.gather(2, row.clamp(0, count - 1)[:, None, :, None].expand(*store.early.shape))
    store.early = torch.where(here[:, None, :, None], rows, store.early)
    reached = torch.minimum(store.seen, torch.tensor(warmup, device=q.device))
    store.noted = torch.where(begin[:, 0] <= store.noted, torch.maximum(store.noted, reached), store.noted)
    whole = (store.lengths == store.seen[:, None]).all(1) & store.ordered
    entry = ((store.noted == warmup) & whole & ~store.grouped).nonzero().flatten()
    if not len(entry):
        return None
    heads = torch.arange(store.lengths.shape[1], device=q.device)
    k, v = store.rows(torch.meshgrid(entry, heads, place, indexing="ij"))  # type: ignore[arg-type]
    early = store.early[entry].to(store.dtype)
    out, lse = _both(attend(early, k, v, causal=True, scale=scale, softcap=softcap, return_lse=True, impl=impl))
    leader = store.table.leader.clone()
    leader[entry] = store.grouping.leaders(first_weights(early, k, scale, softcap), len(heads))
    store.table.share(leader)
    store.grouped[entry] = True
    if bool(store.grouped.all()):
        store.waiting, store.early = False, None
    which, token = here[entry].nonzero(as_tuple=True)
    return FirstRows(entry[which], row[entry[which], token], out[which, :, token], lse[which, :, token])


def first_weights(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Causal weights of a few tokens among themselves, `[n, H, W, W]`, of `q` and `k` `[n, H or G, W, D]`."""
    dtype, share = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
    scores = q.to(dtype) @ k.to(dtype).repeat_interleave(share, 1).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def _attend_prompt(
    q: Tensor, store: SharedKeyStore, scale: float, softcap: float | None, impl: str
) -> tuple[Tensor, Tensor]:
    """Of tokens that are all that is stored: a leader's scores are taken once and weigh its heads' values side by side.

    Clusters of a size are one call of the engine.
    """
    options: dict[str, Any] = {"causal": True, "scale": scale, "softcap": softcap, "return_lse": True, "impl": impl}
    leader, keys, values = store.table.leader, store.table.keys.whole("key"), store.values
    padded = not bool((store.lengths == q.shape[2]).all())
    rows = (_at_slots(q, store) if padded else q).to(store.dtype)
    if store.table.shares:
        groups = leader.shape[1]
        rows = rows.unflatten(1, (groups, -1))
        out = values.new_empty(*rows.shape[:-1], values.shape[3])
        lse = out.new_empty(out.shape[:-1], dtype=accumulation_dtype(store.dtype))
        led = leader[:, None] == torch.arange(groups, device=q.device)[:, None]  # [B, leaders, heads]
        sizes = led.sum(2)
        for size in sizes.unique().tolist()[1:]:  # none is led by a head that follows, and one at least does
            entry, head = (sizes == size).nonzero(as_tuple=True)
            query, key = rows[entry, head], keys[entry, head][:, None]
            for some in led[entry, head].nonzero()[:, 1].view(-1, size).split(WIDE, 1):
                value = values[entry[:, None], some].transpose(1, 2).flatten(2)[:, None]
                wide, sums = _both(attend(query, key, value, **options))
                out[entry[:, None], some] = wide.unflatten(3, (some.shape[1], -1)).permute(0, 3, 1, 2, 4)
                lse[entry[:, None], some] = sums[:, None]
        out, lse = out.flatten(1, 2), lse.flatten(1, 2)
    else:
        out, lse = _both(attend(rows, keys, values, **options))
    return _at_rows(out, lse, store, q.shape[2]) if padded else (out, lse)


def _at_slots(q: Tensor, store: SharedKeyStore) -> Tensor:
    """Queries of a prompt, padded on the left, at the slots of their tokens; anything past a length."""
    row = torch.arange(len(store), device=q.device) + q.shape[2] - store.lengths[:, :1]
    return q.gather(2, row.clamp(max=q.shape[2] - 1)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))


def _at_rows(out: Tensor, lse: Tensor, store: SharedKeyStore, count: int) -> tuple[Tensor, Tensor]:
    """The inverse of `_at_slots` for results; 0 and -inf for padding."""
    slot = torch.arange(count, device=out.device) - count + store.lengths[:, :1]
    padding, at = (slot < 0)[:, None], slot.clamp(min=0)[:, None].expand(-1, out.shape[1], -1)
    wide = at[..., None].expand(*at.shape, out.shape[3])
    results = out.gather(2, wide).masked_fill(padding[..., None], 0.0)
    return results, lse.gather(2, at).masked_fill(padding, -torch.inf)


def _both(result: AttentionOutput) -> tuple[Tensor, Tensor]:
    """Of a call that asked for both."""
    return result.out, cast("Tensor", result.lse)


__all__ = ["FirstRows", "attend_shared", "first_weights", "form_clusters"]
