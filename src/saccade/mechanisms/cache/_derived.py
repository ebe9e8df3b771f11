"""What `read` policies keep between steps, and what they share: summaries of slots, lists of slots, and their cost."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from saccade.mechanisms.cache.base import CachePolicy, Choice, Step
from saccade.mechanisms.cache.forms import TensorForm, counts, floats
from saccade.mechanisms.cache.store import KEY, KVStore
from saccade.ops import decode_scores
from saccade.types import KVPages, TokenIndex

SLACK = 16
"""Rows to spare, beside an eighth, when a summary of slots grows."""

LONG = 32
"""Lists of more than so small a part of all slots are put in order by a mark on each slot, shorter ones by sorting."""


class StepSelection(CachePolicy):
    """Chooses anew for each decoded token; a call with several tokens, a prompt, is dense."""

    dense_layers: int

    @abstractmethod
    def select(self, q: Tensor, store: KVStore, step: Step) -> Choice:
        """Slots for one query per head, `q` `[B, H, 1, D]`; adds what it reads for that to `step.choosing`."""

    def read(self, q: Tensor, store: KVStore, step: Step) -> Choice:
        """All in the first layers and for several tokens, else `select`."""
        if q.shape[2] != 1 or step.layer < self.dense_layers:
            return None
        return self.select(q, store, step)

    def first_alike(self, layer: int) -> int:
        """The first layer reads everything as long as others do."""
        return 0 if layer < self.dense_layers else self.dense_layers


@dataclass
class Derived:
    """What a policy keeps of a layer between steps.

    Args:
        changes: `KVStore.changes` when it was made: good as long as it is the same.
        tensors: By name, of the forms that the policy's `derives` says.
    """

    changes: int
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        return sum(x.nbytes for x in self.tensors.values())

    def select(self, rows: Tensor) -> Derived:
        """The same of these batch entries, int64 `[n]`, repeats allowed; copied, as steps write to it in place."""
        return Derived(self.changes, {name: x[rows] for name, x in self.tensors.items()})


def recall(store: KVStore, name: str) -> Derived | None:
    """What was kept under a name; None if nothing was, or slots have moved since."""
    found = store.derived.get(name)
    if found is not None and found.changes != store.changes:
        del store.derived[name]
        return None
    return found


def key_nbytes(store: KVStore) -> int:
    """Bytes of one key as it is stored, scales included."""
    parts = store.table.layout.parts
    return sum(parts[name].width * parts[name].dtype.itemsize for name in KEY if name in parts)


def scores(q: Tensor, keys: Tensor, lengths: Tensor | None = None) -> Tensor:
    """`q k^T` of one query per head and what stands for tokens, which is read in place.

    Args:
        q: `[B, H, 1, D]`.
        keys: `[B, G, n, D]`.
        lengths: int64 `[B, G]`, how many of them a head has, n the most; None for all.

    Returns:
        `[B, H, n]` in fp32 (fp64 for fp64); -inf past a head's length.
    """
    rows = keys.flatten(0, 1)
    table = torch.arange(len(rows), device=keys.device).view(*keys.shape[:2], 1)
    lengths = torch.full_like(table[..., 0], keys.shape[2]) if lengths is None else lengths
    return decode_scores(q.to(keys.dtype), KVPages(rows, rows, table, lengths), scale=1.0)[:, :, 0]


def per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """`[B, G, ..]` as `[B, H, ..]`."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def highest(ranks: Tensor, count: int, slots: int) -> TokenIndex:
    """The `count` highest of `[B, L, n]` as a list of slots in order; -inf is never among them."""
    best, chosen = ranks.topk(min(count, ranks.shape[-1]), dim=-1, sorted=False)
    if LONG * chosen.shape[-1] < slots or bool((best == -torch.inf).any()):
        return listed(chosen.masked_fill(best == -torch.inf, -1), slots)
    marks = torch.zeros(*chosen.shape[:-1], slots, dtype=torch.bool, device=ranks.device)
    marks.scatter_(-1, chosen, value=True)
    first = torch.arange(0, marks.numel(), slots, device=ranks.device).view(*chosen.shape[:-1], 1)
    return TokenIndex((marks.flatten().nonzero().view_as(chosen) - first)[:, :, None], 1, slots)


def listed(chosen: Tensor, slots: int) -> TokenIndex:
    """Slots `[B, L, K]`, -1 for none, in order."""
    return TokenIndex(chosen.sort(-1).values[:, :, None], 1, slots)


def slots_of(mask: Tensor) -> Tensor:
    """The places of `mask` `[.., n]` that are True, int64 `[.., K]`; -1 fills up short rows."""
    counts = mask.sum(-1)
    slots = torch.full((*counts.shape, max(1, int(counts.max()))), -1, device=mask.device)
    *rows, column = mask.nonzero(as_tuple=True)
    before = (counts.flatten().cumsum(0) - counts.flatten()).repeat_interleave(counts.flatten())
    slots[(*rows, torch.arange(len(column), device=mask.device) - before)] = column
    return slots


def between(first: Tensor, stop: Tensor) -> Tensor:
    """The slots first .. stop - 1 of each row, int64 `[.., K]`; -1 fills up short rows."""
    count = (stop - first).clamp(min=0)
    place = torch.arange(int(count.max()), device=count.device)
    return torch.where(place < count[..., None], first[..., None] + place, -1)


def add_to_stat(store: KVStore, name: str, slots: Tensor, numbers: Tensor) -> None:
    """Add `numbers` `[B, G, K]` to what the store keeps under a name for some slots, int64 `[B, G, K]`; -1 for none."""
    entry, head, column = (slots >= 0).nonzero(as_tuple=True)
    where = entry, head, slots[entry, head, column]
    old = store.table.parts[name][store.table.find(where)]
    store.table.write(where, {name: old + numbers[entry, head, column][:, None]})


def of_each_token(store: KVStore, name: str, make: Callable[[Tensor], Tensor], step: Step) -> Tensor:
    """Numbers made of each key, kept between steps: only tokens that are new are looked at.

    Args:
        store: With tokens.
        name: Under which they are kept.
        make: Of keys `[B, G, m, D]` makes `[B, G, m, W]`, each of its key alone.
        step: Is told what was read.

    Returns:
        `[B, G, n, W]`; past a head's length anything.
    """
    kept, slots, keys = _begin(store, name, step)
    fresh = make(keys)
    old = kept.tensors.get("rows")
    if old is None:
        old = fresh.new_zeros(*fresh.shape[:2], 0, fresh.shape[3])
    rows = room(old, len(store), 0)
    inside = (slots < store.lengths[..., None]).nonzero(as_tuple=True)
    rows[inside[0], inside[1], slots[inside]] = fresh[inside]
    kept.tensors |= {"rows": rows, "lengths": store.lengths}
    return rows[:, :, : len(store)]


def rows_form(width: int, dtype: torch.dtype | None = None) -> dict[str, TensorForm]:
    """What `of_each_token` keeps, of W numbers in a dtype; None for any floating point."""
    return {"rows": TensorForm(f"B G n+ {width}", dtype), "lengths": counts("B G")}


def page_bounds(store: KVStore, size: int, step: Step) -> tuple[Tensor, Tensor]:
    """Least and greatest number in each channel of the keys of each page, kept between steps.

    Args:
        store: With tokens.
        size: Slots of a page.
        step: Is told what was read.

    Returns:
        Two tensors `[B, G, ceil(n / size), D]` in the dtype of keys; inf and -inf on pages past a head's length.
    """
    kept, slots, keys = _begin(store, bounds_name(size), step)
    pages, first = -(-len(store) // size), slots[..., :1] // size
    place = (slots.clamp(max=len(store) - 1) // size - first).clamp(min=0)
    touched = first + torch.arange(int(place.max()) + 1, device=keys.device)
    inside = (touched * size < store.lengths[..., None]).nonzero(as_tuple=True)
    rows = inside[0], inside[1], touched[inside]
    hidden = (slots >= store.lengths[..., None])[..., None]
    bounds = []
    for name, of_two, least, worst in (("low", torch.minimum, "amin", inf), ("high", torch.maximum, "amax", -inf)):
        fresh = keys.new_full((*touched.shape, keys.shape[3]), worst)
        fresh.scatter_reduce_(2, place[..., None].expand_as(keys), keys.masked_fill(hidden, worst), least)
        old = kept.tensors.get(name)
        grown = room(keys.new_zeros(*keys.shape[:2], 0, keys.shape[3]) if old is None else old, pages, worst)
        grown[rows] = of_two(grown[rows], fresh[inside])  # a reduction into all of it would copy all of it
        kept.tensors[name] = grown
        bounds.append(grown[:, :, :pages])
    kept.tensors["lengths"] = store.lengths
    return bounds[0], bounds[1]


BOUNDS_FORM = {"low": floats("B G pages D"), "high": floats("B G pages D"), "lengths": counts("B G")}
"""What `page_bounds` keeps."""


def bounds_name(size: int) -> str:
    """What `page_bounds` keeps it under."""
    return f"pages of {size}"


def _begin(store: KVStore, name: str, step: Step) -> tuple[Derived, Tensor, Tensor]:
    """What is kept, which slots are new `[B, G, m]`, some past a head's length, and their keys."""
    kept = recall(store, name)
    if kept is None:
        kept = store.derived[name] = Derived(store.changes, {"lengths": torch.zeros_like(store.lengths)})
    before = kept.tensors["lengths"]
    new = store.lengths - before
    step.choosing += int(new.sum()) * key_nbytes(store)
    if not bool(before.any()):
        keys = store.keys
        return kept, torch.arange(len(store), device=keys.device).expand(keys.shape[:3]), keys
    slots = before[..., None] + torch.arange(int(new.max()), device=before.device)
    return kept, slots, store.gather(slots.clamp(max=len(store) - 1).where(slots < store.lengths[..., None], -1))[0]


def room(x: Tensor, rows: int, filler: float) -> Tensor:
    """`x` `[B, G, R, W]`, or a larger copy where R is less than `rows`."""
    have = x.shape[2]
    if have >= rows:
        return x
    wanted = rows + (rows // 8 + SLACK if have else 0)
    larger = x.new_full((*x.shape[:2], wanted, x.shape[3]), filler)
    larger[:, :, :have] = x
    return larger


__all__ = [
    "BOUNDS_FORM",
    "Derived",
    "StepSelection",
    "add_to_stat",
    "between",
    "bounds_name",
    "highest",
    "key_nbytes",
    "listed",
    "of_each_token",
    "page_bounds",
    "per_query_head",
    "recall",
    "room",
    "rows_form",
    "scores",
    "slots_of",
]
