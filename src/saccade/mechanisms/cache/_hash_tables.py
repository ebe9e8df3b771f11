"""Hash tables over stored keys: each table's slots sorted by code, and a tail of codes that are not in them yet."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saccade.mechanisms.cache._derived import per_query_head, room
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.forms import TensorForm, counts
from saccade.mechanisms.cache.weights import SCORE_ELEMENTS

TAIL = 8
"""The tail is taken into the tables when its square is more than so many times their slots.

A step compares the whole tail, so one that grows to T costs T^2 / 2 comparisons; taking it in moves every slot of the
tables once. Both together are least, over a long text, where they are equal: at a T that grows with the root of the
slots. Moving a slot took the time of 3 to 14 comparisons where this was measured.
"""


def tables_form(tables: int, buckets: int) -> dict[str, TensorForm]:
    """What `tables_of` and `extend` make of codes of so many tables."""
    small = (torch.int16, torch.int32)
    return {
        "slots": TensorForm(f"B G {tables} n-", small, 0, "n"),
        "starts": TensorForm(f"B G {tables} {buckets + 1}", small, 0, "n-", 1),
        "tail": TensorForm(f"B G tail {tables}", torch.int16),
        "filled": counts("B G", "tail"),
    }


def tables_of(codes: Tensor, lengths: Tensor, buckets: int) -> dict[str, Tensor]:
    """As `build`, with an empty `tail` int16 `[B, G, T, L]` and how many codes are in it, `filled` int64 `[B, G]`."""
    rest = {"tail": codes[:, :, :0].clone(), "filled": torch.zeros_like(lengths)}
    return build(codes, lengths, buckets) | rest


def extend(tables: dict[str, Tensor], codes: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Take in the next slots: they go to the tail, and the tail goes into the tables if it is long.

    Args:
        tables: Of the slots before.
        codes: int16 `[B, G, m, L]`.
        counts: int64 `[B, G]`, how many of the m each head has.

    Returns:
        What has changed of the tables; the tail may have been written to in place.
    """
    filled = tables["filled"] + counts
    longest = int(filled.max())
    tail = room(tables["tail"], longest, 0)
    entry, head, number = (torch.arange(codes.shape[2], device=codes.device) < counts[..., None]).nonzero(as_tuple=True)
    tail[entry, head, tables["filled"][entry, head] + number] = codes[entry, head, number]
    if longest**2 <= TAIL * tables["slots"].shape[3]:
        return {"tail": tail, "filled": filled}
    more = build(tail[:, :, :longest], filled, tables["starts"].shape[3] - 1)
    return merge(tables, more) | {"tail": tail[:, :, :0].clone(), "filled": torch.zeros_like(filled)}


def build(codes: Tensor, lengths: Tensor, buckets: int) -> dict[str, Tensor]:
    """Tables of some slots, by one sort of all codes of as many heads as are held at once: of one list, not of rows.

    Args:
        codes: int16 `[B, G, n, L]`, the bucket of each slot in each of L tables.
        lengths: int64 `[B, G]`, slots of each head; past them codes are anything.
        buckets: Of a table.

    Returns:
        `slots` `[B, G, L, n]`, bucket after bucket, those past a head's length last; `starts` `[B, G, L, buckets + 1]`,
        where buckets begin, and the last one ends. int16 where slots fit, else int32.
    """
    batch, heads, count, tables = codes.shape
    slots = codes.new_empty(batch * heads, tables, count, dtype=_small(count))
    starts = codes.new_empty(batch * heads, tables, buckets + 1, dtype=_small(count))
    absent = torch.arange(count, device=codes.device) >= lengths.flatten()[:, None]
    codes = codes.flatten(0, 1)
    for some in _parts(len(slots), tables * max(count, buckets)):
        rows = len(slots[some]) * tables
        keys = codes[some].transpose(1, 2).to(_wide(rows * (buckets + 1)))
        keys = keys.masked_fill(absent[some, None], buckets).flatten(0, 1)
        keys = (keys + torch.arange(rows, dtype=keys.dtype, device=keys.device)[:, None] * (buckets + 1)).flatten()
        order = (
            keys.sort(stable=True).indices.view(rows, count) - torch.arange(rows, device=keys.device)[:, None] * count
        )
        slots[some] = order.view(-1, tables, count).to(slots.dtype)
        sizes = torch.bincount(keys, minlength=rows * (buckets + 1)).view(-1, tables, buckets + 1)
        starts[some] = (sizes.cumsum(-1) - sizes).to(starts.dtype)
    return {"slots": slots.unflatten(0, (batch, heads)), "starts": starts.unflatten(0, (batch, heads))}


def merge(old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tables of the slots of both, those of `new` being the next after `old`'s: each slot moves once, none is sorted.

    A slot of `old` moves up by what `new` has in the buckets before its own, one of `new` by what `old` has there and
    in its own.
    """
    first, more = _taken(old), _taken(new)
    counts = [x["slots"].shape[3] for x in (old, new)]
    batch, heads, tables, ends = old["starts"].shape
    total = int((first + more).max())
    slots = old["slots"].new_empty(batch * heads, tables, total, dtype=_small(total))
    before = [x["starts"].flatten(0, 1) for x in (old, new)]
    lists = [x["slots"].flatten(0, 1) for x in (old, new)]
    base = first.flatten()[:, None, None]
    for some in _parts(len(slots), tables * max(sum(counts), ends)):
        rows = len(slots[some]) * tables
        mine, theirs = (x[some].to(torch.int64).view(rows, ends) for x in before)
        row = torch.arange(rows, device=slots.device)[:, None] * sum(counts)
        moved = slots.new_empty(rows * sum(counts))
        for shift, own, count, part in (
            (theirs, mine, counts[0], lists[0][some]),
            (torch.cat([mine[:, 1:], mine.new_full((rows, 1), counts[0])], 1), theirs, counts[1],
             lists[1][some] + base[some]),
        ):  # fmt: skip
            sizes = torch.cat([own[:, 1:], own.new_full((rows, 1), count)], 1) - own  # the last: past a head's length
            place = (shift + row).flatten().repeat_interleave(sizes.flatten(), output_size=rows * count)
            place = place.view(rows, count) + torch.arange(count, device=slots.device)
            moved[place.flatten()] = part.to(slots.dtype).flatten()
        slots[some] = moved.view(-1, tables, sum(counts))[:, :, :total]
    starts = old["starts"].to(slots.dtype) + new["starts"].to(slots.dtype)
    return {"slots": slots.unflatten(0, (batch, heads)), "starts": starts}


def hashed(tables: dict[str, Tensor]) -> Tensor:
    """How many slots of each head are in the tables or the tail, int64 `[B, G]`."""
    return _taken(tables) + tables["filled"]


def met(tables: dict[str, Tensor], codes: Tensor, slots: int, step: Step) -> Tensor:
    """Which slots share a bucket with a query in two tables or more.

    Args:
        tables: What `tables_of` and `extend` made.
        codes: int16 `[B, H, L]` of one query per head.
        slots: How many the longest head has, n.
        step: Is told what was read: where buckets begin and end, the slots in them, and the tail's codes.

    Returns:
        Bool `[B, H, n]`.
    """
    batch, heads, count = codes.shape
    tail, sizes = tables["tail"], tables["filled"]
    groups = tail.shape[1]
    head = torch.arange(batch * heads, device=codes.device) // (heads // groups)  # batch entries need no other number
    table = (head[:, None] * count + torch.arange(count, device=codes.device)).flatten()
    bounds, lists = tables["starts"].flatten(), tables["slots"].flatten()
    place = table * tables["starts"].shape[3] + codes.flatten()
    start, stop = bounds[place].to(torch.int64), bounds[place + 1].to(torch.int64)
    found, first = (stop - start).view(-1, count), (start + table * tables["slots"].shape[3]).view(-1, count)
    step.choosing += int(found.sum()) * lists.itemsize + 2 * place.numel() * bounds.itemsize
    hits = torch.empty(batch * heads, slots + 1, dtype=torch.bool, device=codes.device)  # one more, for no slot
    for some in _parts(len(hits), int(found.sum(1).max())):
        members = _ranges(first[some].flatten(), found[some].flatten())
        row = torch.arange(len(hits[some]), device=codes.device).repeat_interleave(found[some].sum(1))
        places = row * (slots + 1) + lists[members]
        hits[some] = torch.bincount(places, minlength=hits[some].numel()).view(-1, slots + 1) >= 2
    hits = hits.unflatten(0, (batch, heads))
    width = int(sizes.max())
    if width:
        step.choosing += int(sizes.sum()) * count * tail.itemsize
        pairs = tail[:, :, None, :width] == codes.unflatten(1, (groups, -1))[:, :, :, None]
        number = torch.arange(width, device=codes.device)
        where = (_taken(tables)[..., None] + number).masked_fill(number >= sizes[..., None], slots)
        hits.scatter_(2, per_query_head(where, codes), pairs.flatten(1, 2).sum(-1) >= 2)
    return hits[:, :, :slots]


def _taken(tables: dict[str, Tensor]) -> Tensor:
    """How many slots of each head are in the tables."""
    return tables["starts"][:, :, 0, -1].to(torch.int64)


def _ranges(first: Tensor, counts: Tensor) -> Tensor:
    """first, first + 1, .. of each range, one range after the other."""
    ends = counts.cumsum(0)
    return (first - ends + counts).repeat_interleave(counts) + torch.arange(int(ends[-1]), device=first.device)


def _parts(rows: int, elements: int) -> Iterator[slice]:
    """Slices of rows of so many elements each, as many at once as may be held."""
    some = max(1, SCORE_ELEMENTS // max(1, elements))
    return (slice(first, first + some) for first in range(0, rows, some))


def _small(count: int) -> torch.dtype:
    """For numbers up to `count`."""
    return torch.int16 if count <= torch.iinfo(torch.int16).max else torch.int32


def _wide(count: int) -> torch.dtype:
    """Likewise, of what is sorted: half the width is twice as fast."""
    return torch.int32 if count <= torch.iinfo(torch.int32).max else torch.int64


__all__ = ["TAIL", "build", "extend", "hashed", "merge", "met", "tables_form", "tables_of"]
