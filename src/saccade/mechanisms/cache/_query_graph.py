"""An index over stored keys made from a prompt's queries, and a search in it."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.mechanisms.cache._derived import key_nbytes
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.forms import slot_numbers
from saccade.mechanisms.cache.remote import RemoteStore
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.tiered import TieredStore
from saccade.mechanisms.cache.weights import SCORE_ELEMENTS
from saccade.ops import KeyGraph, search_graph
from saccade.ops.checks import accumulation_dtype

ID_NBYTES = 4
"""Bytes of one number of a node."""

FORM = {
    "lists": slot_numbers("B G S degree", "n-", torch.int32),
    "links": slot_numbers("B G n- links", "S", torch.int32),
    "entries": slot_numbers("B G degree", "n-", torch.int32),
}
"""What `build` makes, S queries having been asked."""


def build(queries: Tensor, places: Tensor, store: KVStore, inside: Tensor, degree: int, links: int) -> KeyGraph:
    """Link queries with the keys they score highest, and keys with the queries that score them highest.

    Exact, in bounded chunks of queries; a query knows no key that comes after it.

    Args:
        queries: `[B, G, S, D]`.
        places: int64 `[B, S]`, their places in the text; -1 for none.
        store: With n slots.
        inside: Bool `[B, G, n]`, the keys that are indexed.
        degree: Keys linked with a query.
        links: Queries linked with a key.

    Returns:
        The graph; lists, links and entries by falling score, the entries' that of the mean query.
    """
    dtype, keys = accumulation_dtype(queries.dtype), store.keys
    batch, heads, slots, _ = keys.shape
    positions = store.positions.masked_fill(~inside, torch.iinfo(torch.int64).max)
    keys, wide = keys.to(dtype).transpose(-1, -2), queries.to(dtype)
    lists: list[Tensor] = []
    best = wide.new_full((batch, heads, links, slots), -torch.inf)
    asked = torch.full_like(best, -1, dtype=torch.int64)
    numbers = torch.arange(queries.shape[2], device=keys.device)
    for some in numbers.split(max(1, SCORE_ELEMENTS // max(1, batch * heads * slots))):
        hidden = positions[:, :, None] > places[:, None, some, None]
        scores = (wide[:, :, some] @ keys).masked_fill(hidden, -torch.inf)
        lists.append(_top(scores, degree))
        highest, who = [best], [asked]
        for _ in range(min(links, len(some))):  # one after the other: `topk` is slow across rows
            highest_here, here = scores.max(2, keepdim=True)
            scores.scatter_(2, here, -torch.inf)
            highest.append(highest_here)
            who.append(here + some[0])
        best, order = torch.cat(highest, 2).topk(links, dim=2)
        asked = torch.cat(who, 2).gather(2, order)
    asked = asked.masked_fill(best == -torch.inf, -1).transpose(2, 3)
    known = (places >= 0)[:, None, :, None]
    mean = wide.masked_fill(~known, 0.0).sum(2, keepdim=True) / known.sum(2, keepdim=True).clamp(min=1)
    entries = _top((mean @ keys).masked_fill(~inside[:, :, None], -torch.inf), degree)[:, :, 0]
    return KeyGraph(torch.cat(lists, 2), asked.to(torch.int32), entries)


def search(
    q: Tensor, store: KVStore, graph: KeyGraph, width: int, expand: int, step: Step, impl: str = "auto"
) -> Tensor:
    """Slots that score highest for one query per head, as far as `search_graph` finds them.

    Args:
        q: `[B, H, 1, D]`.
        store: With the slots, whose keys are read in place where the engine can.
        graph: What `build` made.
        width: Keys kept while searching.
        expand: Keys whose neighbours are looked at in a round.
        step: Is told what was read.
        impl: Implementation of `search_graph`.

    Returns:
        int64 `[B, H, width]`, by falling score; -1 where fewer were found.
    """
    in_place = store.storage.bits != 2 and not isinstance(store, TieredStore | RemoteStore)
    found = search_graph(
        q, graph, store.lengths, lambda slots: store.rows(slots)[0], width, expand,
        cache=store.pages() if in_place else None, channels=None if store.channels is None else store.channels[0],
        impl=impl,
    )  # fmt: skip
    step.choosing += found.keys * key_nbytes(store) + found.numbers * ID_NBYTES
    return found.slots


def _top(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` highest of `[.., n]`, int32 `[.., count]`; -1 for -inf and where n is less."""
    highest, order = scores.topk(min(count, scores.shape[-1]), dim=-1)
    order = order.masked_fill(highest == -torch.inf, -1).to(torch.int32)
    return torch.nn.functional.pad(order, (0, count - order.shape[-1]), value=-1)


__all__ = ["FORM", "build", "search"]
