"""An index over stored keys made from a prompt's queries, and a best-first search in it, all heads at once."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.mechanisms.cache._derived import key_nbytes, per_query_head
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.weights import SCORE_ELEMENTS
from saccade.ops.checks import accumulation_dtype

ID_NBYTES = 4
"""Bytes of one number of a node."""


def build(queries: Tensor, places: Tensor, store: KVStore, degree: int, links: int) -> dict[str, Tensor]:
    """Link queries with the keys they score highest, and keys with the queries that score them highest.

    Exact, in bounded chunks of queries; a query knows no key that comes after it.

    Args:
        queries: `[B, G, S, D]`.
        places: int64 `[B, S]`, their places in the text; -1 for none.
        store: With n slots.
        degree: Keys linked with a query.
        links: Queries linked with a key.

    Returns:
        int32 `lists` `[B, G, S, degree]`, slots by falling score; `links` `[B, G, n, links]`, queries by falling
        score; `entries` `[B, G, degree]`, the slots that the mean query scores highest. -1 where there is none.
    """
    dtype, keys = accumulation_dtype(queries.dtype), store.keys
    batch, heads, slots, _ = keys.shape
    positions = store.positions.masked_fill(~store.present, torch.iinfo(torch.int64).max)
    keys, wide = keys.to(dtype).transpose(-1, -2), queries.to(dtype)
    lists: list[Tensor] = []
    best = wide.new_full((batch, heads, links, slots), -torch.inf)
    asked = torch.full_like(best, -1, dtype=torch.int64)
    numbers = torch.arange(queries.shape[2], device=keys.device)
    for some in numbers.split(max(1, SCORE_ELEMENTS // max(1, batch * heads * slots))):
        hidden = positions[:, :, None] > places[:, None, some, None]
        scores = (wide[:, :, some] @ keys).masked_fill(hidden, -torch.inf)
        lists.append(_top(scores, degree))
        candidates = some[:, None].expand(batch, heads, -1, slots)
        best, order = torch.cat([best, scores], 2).topk(links, dim=2)
        asked = torch.cat([asked, candidates], 2).gather(2, order)
    asked = asked.masked_fill(best == -torch.inf, -1).transpose(2, 3)
    known = (places >= 0)[:, None, :, None]
    mean = wide.masked_fill(~known, 0.0).sum(2, keepdim=True) / known.sum(2, keepdim=True).clamp(min=1)
    entries = _top((mean @ keys).masked_fill(~store.present[:, :, None], -torch.inf), degree)[:, :, 0]
    return {"lists": torch.cat(lists, 2), "links": asked.to(torch.int32), "entries": entries}


def search(q: Tensor, store: KVStore, graph: dict[str, Tensor], width: int, expand: int, step: Step) -> Tensor:
    """Slots that score highest for one query per head, as far as a best-first search finds them.

    The `width` best keys seen so far are kept. Round by round the `expand` best whose neighbours were not looked at
    yet are: through the queries a key is linked with, the keys these are linked with. Ends when there are none.

    Args:
        q: `[B, H, 1, D]`.
        store: With the slots.
        graph: What `build` made.
        width: Keys kept while searching.
        expand: Keys looked at in a round.
        step: Is told what was read.

    Returns:
        int64 `[B, H, width]`, by falling score; -1 where fewer were found.
    """
    dtype, (batch, heads) = accumulation_dtype(q.dtype), q.shape[:2]
    share = heads // store.lengths.shape[1]
    entry = torch.arange(batch, device=q.device)[:, None, None]
    group = (torch.arange(heads, device=q.device) // share)[:, None]
    wide = q.to(dtype).transpose(-1, -2)
    found = torch.full((batch, heads, width), -1, device=q.device)
    scores = wide.new_full((batch, heads, width), -torch.inf)
    open_ = torch.zeros_like(found, dtype=torch.bool)
    seen = torch.zeros(batch, heads, len(store) + 1, dtype=torch.bool, device=q.device)  # the last place for -1
    seen[:, :, -1] = True
    near = per_query_head(graph["entries"], q).long()
    while True:
        near = near.sort(-1).values  # a key that is near for two reasons is read once
        twice = torch.nn.functional.pad(near[..., 1:] == near[..., :-1], (1, 0))
        near = near.masked_fill(twice | seen.gather(2, near.where(near >= 0, len(store))), -1)
        seen.scatter_(2, near.where(near >= 0, len(store)), value=True)
        step.choosing += int((near >= 0).sum()) * key_nbytes(store)
        new = (store.gather(near)[0].to(dtype) @ wide)[..., 0].masked_fill(near < 0, -torch.inf)
        scores, order = torch.cat([scores, new], -1).topk(width, dim=-1)
        found = torch.cat([found, near], -1).gather(2, order)
        open_ = torch.cat([open_, near >= 0], -1).gather(2, order)
        if not bool(open_.any()):
            return found
        rank, next_ = scores.masked_fill(~open_, -torch.inf).topk(min(expand, width), dim=-1)
        chosen = found.gather(2, next_).masked_fill(rank == -torch.inf, -1)
        open_ = open_.scatter(2, next_, value=False)
        asked = graph["links"][entry, group, chosen.clamp(min=0)].masked_fill((chosen < 0)[..., None], -1).flatten(2)
        lists = graph["lists"][entry, group, asked.clamp(min=0).long()].masked_fill((asked < 0)[..., None], -1)
        step.choosing += (int((asked >= 0).sum()) + int((lists >= 0).sum())) * ID_NBYTES
        near = lists.flatten(2).long()


def _top(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` highest of `[.., n]`, int32 `[.., count]`; -1 for -inf and where n is less."""
    highest, order = scores.topk(min(count, scores.shape[-1]), dim=-1)
    order = order.masked_fill(highest == -torch.inf, -1).to(torch.int32)
    return torch.nn.functional.pad(order, (0, count - order.shape[-1]), value=-1)


__all__ = ["build", "search"]
