"""KVStore: the keys and values one layer has kept, ragged and in pages, and what is known about each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.mechanisms.cache.arena import Arena
from saccade.mechanisms.cache.checks import check_slots, check_tokens
from saccade.mechanisms.cache.pagetable import PageLayout, PageTable, Slots
from saccade.mechanisms.cache.saving import Savable
from saccade.mechanisms.cache.storage import KEY, VALUE, Storage, lay_out
from saccade.types import KVPages


class KVStore(Savable):
    """What one layer keeps of its past: each (batch entry, key/value head) holds its own number of tokens.

    A token lies in a *slot*; a head has the slots 0 .. length - 1. Slots are in order of position until `evict` fills a
    gap with the last token; `append` restores the order before it takes in several tokens at once. Tensors `[B, G, n]`
    have a place for each slot of the longest head and hold filler past a head's length.

    Args:
        storage: How keys and values lie in memory; None for floating point as it comes.
        stats: Names of numbers to keep for each token, from 0 on; see `stat`.

    Attributes:
        seen: int64 `[B]`, tokens of each sequence so far, kept or not; the next has this position.
        ordered: Whether slots are in order of position.
        changes: How often tokens were moved or removed, for policies that keep summaries of slots.
        channels: What divides channels of keys `[B, G, D]` and values `[B, G, E]`, or None; see `Storage.normalise`.
        dtype: Of the keys and values that come and go.
        dims: D and E.
        table: Where the tokens lie.
        derived: By name, what `read` keeps between steps (`_derived.py`).
    """

    def __init__(self, storage: Storage | None = None, stats: Sequence[str] = ()) -> None:
        self.storage = Storage() if storage is None else storage
        self.stats = tuple(stats)
        self.seen = torch.zeros(0, dtype=torch.int64)
        self.ordered, self.changes = True, 0
        self.channels: tuple[Tensor, Tensor] | None = None
        self.dtype, self.dims = torch.float32, (0, 0)
        self.derived: dict[str, Any] = {}
        self.table = PageTable(Arena(0, torch.device("cpu")), PageLayout({}, self.storage.page), 0, 0)

    def __len__(self) -> int:
        """Slots of the longest head, n."""
        return self.table.longest

    @property
    def empty(self) -> bool:
        """Whether nothing was ever appended."""
        return not self.table.layout.parts

    @property
    def lengths(self) -> Tensor:
        """Tokens of each head, int64 `[B, G]`."""
        return self.table.lengths

    @property
    def complete(self) -> bool:
        """Whether every token that was appended is still there."""
        return bool((self.lengths == self.seen[:, None]).all())

    @property
    def tokens(self) -> int:
        """Tokens held, over all batch entries and heads."""
        return int(self.lengths.sum())

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the pages hold, with those of its forks, and of what is derived from them."""
        return self.table.arena.nbytes + sum(x.nbytes for x in self.derived.values())

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one key and its value as they are stored, scales included; 0 while empty."""
        parts = self.table.layout.parts
        return sum(parts[name].width * parts[name].dtype.itemsize for name in KEY + VALUE if name in parts)

    @property
    def present(self) -> Tensor:
        """Bool `[B, G, n]`: which slots hold a token."""
        return torch.arange(len(self), device=self.lengths.device) < self.lengths[..., None]

    @property
    def positions(self) -> Tensor:
        """Place of each slot's token in its sequence, int64 `[B, G, n]`; -1 past a head's length."""
        return self._part("position")[..., 0].to(torch.int64).masked_fill(~self.present, -1)

    @property
    def keys(self) -> Tensor:
        """A copy of all keys in `dtype`, `[B, G, n, D]`; 0 past a head's length."""
        return self._dense(0)

    @property
    def values(self) -> Tensor:
        """A copy of all values in `dtype`, `[B, G, n, E]`; 0 past a head's length."""
        return self._dense(1)

    def stat(self, name: str) -> Tensor:
        """A number that is kept for each token, `[B, G, n]` in fp32 (fp64 for fp64 keys); 0 past a head's length."""
        return self._part(name)[..., 0].masked_fill(~self.present, 0.0)

    def set_stat(self, name: str, numbers: Tensor) -> None:
        """Replace the numbers of `stat` by `numbers` `[B, G, n]`."""
        present = self.present
        if name not in self.stats or self.empty:
            raise ValueError(f"name={name!r}: expected one of stats={self.stats}, in a store with tokens")
        check_slots("numbers", numbers, present, numbers.dtype)
        self.table.fill(name, numbers[..., None])

    def append(self, k: Tensor, v: Tensor, present: Tensor | None = None) -> None:
        """Take in the next tokens, copied.

        Args:
            k: `[B, G, m, D]`, with positions mixed in.
            v: `[B, G, m, E]`.
            present: Bool `[B, m]`, which are tokens rather than padding; None for all.

        Raises:
            ValueError: If they do not fit each other or what is stored.
            MemoryError: If there is no memory for them; the store is as before.
        """
        check_tokens(self, k, v, present)
        k, v = k.detach(), v.detach()
        batch, heads, count, _ = k.shape
        if self.empty:
            self._start(k, v, present)
        if count > 1:
            self.sort()
        order, added = torch.arange(count, device=k.device).expand(batch, count), torch.tensor(count, device=k.device)
        if present is None:
            entry, head, token = torch.meshgrid(*(torch.arange(n, device=k.device) for n in k.shape[:3]), indexing="ij")
        else:
            order, added = present.cumsum(1) - 1, present.sum(1)
            entry, head, token = present[:, None].expand(batch, heads, count).nonzero(as_tuple=True)
            k, v = k[entry, head, token], v[entry, head, token]
        order = order[entry, token]
        slots = entry, head, self.lengths[entry, head] + order
        self.table.resize(self.lengths + added[..., None])
        new = self._encoded(0, k, entry, head) | self._encoded(1, v, entry, head)
        new["position"] = (self.seen[entry] + order)[..., None]
        new |= {name: k.new_zeros(1) for name in self.stats}
        self.table.write(slots, new)
        self.seen = self.seen + added

    def evict(self, keep: Tensor) -> None:
        """Keep only some tokens; the memory of pages that are no longer needed is freed at once.

        Costs what it takes to move the last tokens into the gaps, or nothing where there are none.

        Args:
            keep: Bool `[B, G, n]`, the slots to keep.

        Raises:
            ValueError: If `keep` is not bool or not of that shape.
        """
        present = self.present
        check_slots("keep", keep, present, torch.bool)
        keep = keep & present
        lengths = keep.sum(-1)
        first = torch.arange(keep.shape[2], device=keep.device) < lengths[..., None]
        gaps, last = first & ~keep, keep & ~first
        if bool(gaps.any()):
            self.table.move(last.nonzero(as_tuple=True), gaps.nonzero(as_tuple=True))  # type: ignore[arg-type]
            self.ordered = False
        self.table.resize(lengths)
        self.changes += 1

    def sort(self) -> None:
        """Bring slots into the order of their positions."""
        if self.ordered:
            return
        present = self.present
        order = self.positions.masked_fill(~present, torch.iinfo(torch.int64).max).argsort(-1)
        entry, head, slot = present.nonzero(as_tuple=True)
        self.table.move((entry, head, order[entry, head, slot]), (entry, head, slot))
        self.ordered = True
        self.changes += 1

    def overwrite(self, slots: Slots, keys: Tensor, values: Tensor) -> None:
        """Give tokens other keys `[R, D]` and values `[R, E]`; see `rows`."""
        coded = [self._encoded(number, x, *slots[:2]) for number, x in enumerate((keys, values))]
        self.table.write(slots, coded[0] | coded[1])
        self.changes += 1

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens of every sequence; earlier ones that were evicted do not come back."""
        if not self.empty and count:
            self.seen = (self.seen - count).clamp(min=0)
            self.evict(self.positions < self.seen[:, None, None])

    def select(self, rows: Tensor) -> KVStore:
        """A store of these batch entries, int64 `[n]` in any order, repeats allowed (beams).

        Pages are shared with this store until one of the two writes to them.
        """
        other = KVStore(self.storage, self.stats)
        if not self.empty:
            rows = rows.to(self.seen.device)
            other.seen, other.table = self.seen[rows], self.table.select(rows)
            other.ordered, other.changes, other.dtype, other.dims = self.ordered, self.changes, self.dtype, self.dims
            if self.channels is not None:
                other.channels = self.channels[0][rows], self.channels[1][rows]
            other.derived = self._derived_of(rows)
        return other

    def fork(self) -> KVStore:
        """Another store with the same tokens, as `select` gives it."""
        return self.select(torch.arange(len(self.seen)))

    def pages(self) -> KVPages:
        """What `decode_attend` reads, in place: good until the store changes or is gone, which frees them.

        Returns:
            Keys and values as stored: with `channels`, those divided by them.

        Raises:
            ValueError: If the store is empty or holds 2 bits, which the engine cannot read.
        """
        if self.empty or self.storage.bits == 2:
            raise ValueError(f"{self!r}: expected tokens, in floating point or in codes of 8 or 4 bits")
        parts = self.table.parts
        scales = [parts.get(names[kind]) for kind in (1, 2) for names in (KEY, VALUE)]
        return KVPages(parts["key"], parts["value"], self.table.table, self.lengths, *scales)

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B, L, K, D]` and values `[B, L, K, E]` of some slots, in `dtype`.

        Args:
            slots: int64 `[B, L, K]` with L a multiple of G, consecutive lists belonging to one head; -1 gives filler.

        Returns:
            Copies.
        """
        entry = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
        head = torch.arange(slots.shape[1], device=slots.device) // (slots.shape[1] // self.lengths.shape[1])
        return self.rows((entry, head[:, None], slots.clamp(min=0)))

    def rows(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Copies of tokens' keys `[.., D]` and values `[.., E]`; batch entry, head and slot in tensors of one shape."""
        where = self.table.find(slots)
        return self._decoded(0, where, slots[:2]), self._decoded(1, where, slots[:2])

    def _derived_of(self, rows: Tensor) -> dict[str, Any]:
        """What is kept for these batch entries and still good."""
        return {name: kept.select(rows) for name, kept in self.derived.items() if kept.changes == self.changes}

    def _start(self, k: Tensor, v: Tensor, present: Tensor | None) -> None:
        """Lay pages out for tokens like the first ones."""
        layout = lay_out(self.storage, self.stats, (k.shape[3], v.shape[3]), k.dtype)
        self.table = PageTable(Arena(layout.nbytes, k.device), layout, *k.shape[:2])
        self.seen = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        self.dtype, self.dims = k.dtype, (k.shape[3], v.shape[3])
        if self.storage.normalise:
            hidden = None if present is None else ~present[:, None, :, None]
            shown = (x if hidden is None else x.masked_fill(hidden, 0.0) for x in (k, v))
            largest = (x.abs().amax(2).sqrt() if x.shape[2] else torch.ones_like(x.sum(2)) for x in shown)
            self.channels = tuple(torch.where(x > 0, x, 1.0) for x in largest)  # type: ignore[assignment]

    def _encoded(self, number: int, x: Tensor, entry: Tensor, head: Tensor) -> dict[str, Tensor]:
        """Parts that hold keys (0) or values (1), `[.., D]`, of these batch entries and heads `[..]`."""
        coded = self.storage.encode(x if self.channels is None else x / self.channels[number][entry, head])
        return dict(zip((KEY, VALUE)[number], coded, strict=False))

    def _decoded(self, number: int, where: tuple[Tensor, Tensor], heads: tuple[Tensor, Tensor]) -> Tensor:
        """The inverse of `_encoded`, read from pages and rows."""
        names = [name for name in (KEY, VALUE)[number] if name in self.table.layout.parts]
        x = self.storage.decode(tuple(self.table.read(name, where) for name in names), self.dtype)
        return x if self.channels is None else x * self.channels[number][heads]

    def _part(self, name: str) -> Tensor:
        """A part of every slot, `[B, G, n, width]`."""
        if name not in self.table.layout.parts:
            raise ValueError(f"{name!r}: expected one of stats={self.stats}, in a store with tokens")
        return self.table.whole(name)

    def _dense(self, number: int) -> Tensor:
        parts = [self.table.whole(name) for name in (KEY, VALUE)[number] if name in self.table.layout.parts]
        x = self.storage.decode(tuple(parts), self.dtype)
        x = x if self.channels is None else x * self.channels[number][:, :, None]
        return x if bool((self.lengths == len(self)).all()) else x.masked_fill(~self.present[..., None], 0.0)

    def __repr__(self) -> str:
        """Sizes, not the contents."""
        return f"KVStore(slots={len(self)}, seen={self.seen.tolist()}, nbytes={self.nbytes})"


__all__ = ["KEY", "VALUE", "KVStore"]
