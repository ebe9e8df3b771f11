"""SharedKeyStore: keys are kept for some heads only, and the others read theirs: what CHAI needs of a store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from saccade.mechanisms.cache.arena import Arena
from saccade.mechanisms.cache.pagetable import PageLayout, PageTable, Part, Slots
from saccade.mechanisms.cache.saving import TOKENS, Parcel, Table, told
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KEY, VALUE, KVStore
from saccade.types import KVPages

KEYS = "keys"
"""Name of the table of keys."""


class Grouping(Protocol):
    """Says which heads share keys, from the attention of the first tokens."""

    @property
    def warmup(self) -> int:
        """How many tokens, W."""

    def leaders(self, weights: Tensor, heads: int) -> Tensor:
        """Form clusters.

        Args:
            weights: `[n, H, W, W]`, what the first tokens of n sequences attend to.
            heads: G, key/value heads.

        Returns:
            The head whose keys each one reads, int64 `[n, G]`; those that are read by others read their own.
        """


class SharedKeyTable(PageTable):
    """A page table whose keys lie in another one, in which only heads that lead have pages.

    Args:
        arena: Where the pages of all but the keys come from.
        layout: What is held of a token, keys among it.
        keys: The table of the keys, over an arena of its own.
        leader: Becomes `leader`.

    Attributes:
        keys: As given: as many tokens as here for heads that lead, none for the others.
        leader: int64 `[B, G]`, the head whose keys each head reads.
    """

    def __init__(self, arena: Arena, layout: PageLayout, keys: PageTable, leader: Tensor) -> None:
        self.keys, self.leader = keys, leader
        self.follows, self.shares = torch.zeros_like(leader, dtype=torch.bool), False
        super().__init__(arena, layout, *leader.shape)
        self._held = without_keys(layout)

    @property
    def kept(self) -> dict[str, Part]:
        """As `PageTable.kept`: all but the keys."""
        return self._held.parts

    def share(self, leader: Tensor) -> None:
        """Let heads read the keys of those that lead them, int64 `[B, G]`; those of the others are freed."""
        self.leader = leader
        self.follows = leader != torch.arange(leader.shape[1], device=leader.device)
        self.shares = bool(self.follows.any())
        self.keys.resize(self.lengths.masked_fill(self.follows, 0))

    def key_table(self) -> Tensor:
        """Pages of the keys that each head reads, int64 `[B, G, T]`."""
        pages = self.keys.table
        return pages.gather(1, self.leader[..., None].expand(-1, -1, pages.shape[2])) if self.shares else pages

    def find_keys(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """As `find`, of the keys that the slots' heads read."""
        return self.keys.find((slots[0], self.leader[slots[0], slots[1]], slots[2]))

    def whole(self, name: str) -> Tensor:
        """As `PageTable.whole`."""
        if name not in self.keys.layout.parts:
            return super().whole(name)
        part = self.keys.whole(name)
        return part[torch.arange(len(part), device=part.device)[:, None], self.leader] if self.shares else part

    def read(self, name: str, where: tuple[Tensor, Tensor]) -> Tensor:
        """As `PageTable.read`; of keys, at places from `find_keys`."""
        return self.keys.read(name, where) if name in self.keys.layout.parts else super().read(name, where)

    def write(self, slots: Slots, parts: dict[str, Tensor]) -> None:
        """As `PageTable.write`; keys of heads that follow are dropped."""
        keys = {name: x for name, x in parts.items() if name in self.keys.layout.parts}
        super().write(slots, {name: x for name, x in parts.items() if name not in keys})
        if self.shares:
            leads = ~self.follows[slots[0], slots[1]]
            keys = {name: x.expand(*leads.shape, -1)[leads] for name, x in keys.items()}
            slots = (slots[0][leads], slots[1][leads], slots[2][leads])
        self.keys.write(slots, keys)

    def move(self, sources: Slots, targets: Slots) -> None:
        """As `PageTable.move`, within heads."""
        super().move(sources, targets)
        leads = ~self.follows[targets[0], targets[1]]
        self.keys.move(*(tuple(x[leads] for x in slots) for slots in (sources, targets)))  # type: ignore[arg-type]

    def resize(self, lengths: Tensor) -> None:
        """As `PageTable.resize`."""
        before = self.keys.lengths
        self.keys.resize(lengths.masked_fill(self.follows, 0))
        try:
            super().resize(lengths)
        except MemoryError:
            self.keys.resize(before)
            raise

    def select(self, rows: Tensor) -> SharedKeyTable:
        """As `PageTable.select`."""
        other = cast("SharedKeyTable", super().select(rows))
        other.keys = self.keys.select(rows)
        other.leader, other.follows, other.shares = self.leader[rows], self.follows[rows], self.shares
        return other

    def _empty(self) -> SharedKeyTable:
        return SharedKeyTable(self.arena, self.layout, self.keys.select(self.leader.new_zeros(0)), self.leader[:0])


def without_keys(layout: PageLayout, *, keys: bool = False) -> PageLayout:
    """The layout of all but keys, or of them alone."""
    chosen = {name: (p.width, p.dtype) for name, p in layout.parts.items() if (name in KEY) == keys}
    return PageLayout(chosen, layout.size)


class SharedKeyStore(KVStore):
    """A store in which heads of a cluster share one head's keys, as soon as enough tokens have told which are alike.

    Values stay per head. `attend_shared` is its attention, and finds the clusters.

    Args:
        grouping: Says which heads share.
        storage: As in `KVStore`, in floating point.
        stats: As in `KVStore`.

    Attributes:
        early: `[B, H, W, D]`, queries of the first tokens; None before the first, and once all sequences are grouped.
        noted: int64 `[B]`, how many of them are there.
        grouped: Bool `[B]`, whose clusters are found.
        waiting: Whether some are not.
    """

    table: SharedKeyTable

    def __init__(self, grouping: Grouping, storage: Storage | None = None, stats: Sequence[str] = ()) -> None:
        super().__init__(storage, stats)
        self.grouping = grouping
        self.early: Tensor | None = None
        self.noted = torch.zeros(0, dtype=torch.int64)
        self.grouped = torch.zeros(0, dtype=torch.bool)
        self.waiting = True

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, pages of keys among them."""
        keys = 0 if self.empty else self.table.keys.arena.nbytes
        return super().nbytes + keys + (0 if self.early is None else self.early.nbytes)

    @property
    def slot_nbytes(self) -> int:
        """Mean bytes of a token's key and value as they are stored, rounded up: a key that heads share counts once."""
        if not self.tokens:
            return super().slot_nbytes
        keys, all_parts = self.table.keys, self.table.layout.parts
        key, value = (sum(all_parts[n].width * all_parts[n].dtype.itemsize for n in names if n in all_parts)
                      for names in (KEY, VALUE))  # fmt: skip
        return value + math.ceil(key * int(keys.lengths.sum()) / self.tokens)

    def pages(self) -> KVPages:
        """As `KVStore.pages`, with a table of the keys."""
        if self.empty:
            return super().pages()
        values, keys = self.table.parts, self.table.keys.parts
        scales = (parts.get(names[kind]) for kind in (1, 2) for parts, names in ((keys, KEY), (values, VALUE)))
        k_scale, v_scale, k_zero, v_zero = scales
        return KVPages(
            keys["key"], values["value"], self.table.table, self.lengths, k_scale, v_scale, k_zero, v_zero,
            self.table.key_table(),
        )  # fmt: skip

    def rows(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """As `KVStore.rows`."""
        places = self.table.find_keys(slots), self.table.find(slots)
        return self._decoded(0, places[0], slots[:2]), self._decoded(1, places[1], slots[:2])

    def evict(self, keep: Tensor) -> None:
        """As `KVStore.evict`.

        Args:
            keep: Bool `[B, G, n]`.

        Raises:
            ValueError: Also if heads that share keys would keep different tokens.
        """
        if self.table.shares and keep.shape[:2] == self.lengths.shape:
            leads = keep.gather(1, self.table.leader[..., None].expand_as(keep))
            if not torch.equal(leads, keep):
                raise ValueError("keep: expected the same tokens in all heads that share keys")
        super().evict(keep)

    def crop(self, count: int) -> None:
        """As `KVStore.crop`; clusters that were found stay."""
        super().crop(count)
        self.noted = torch.minimum(self.noted, self.seen[: len(self.noted)])

    def select(self, rows: Tensor) -> SharedKeyStore:
        """As `KVStore.select`."""
        other = SharedKeyStore(self.grouping, self.storage, self.stats)
        other.__dict__.update(super().select(rows).__dict__ | {"grouping": self.grouping, "waiting": self.waiting})
        if not self.empty:
            rows = rows.to(self.seen.device)
            other.early = None if self.early is None else self.early[rows]
            other.noted, other.grouped = self.noted[rows], self.grouped[rows]
        return other

    def follow(self, q: Tensor) -> Tensor:
        """Queries `[B, H, M, D]` with those of leaders in the place of their followers' own.

        Query head i of a key/value head reads as query head i of its leader.
        """
        if not self.table.shares:
            return q
        share = q.shape[1] // self.table.leader.shape[1]
        head = self.table.leader[..., None] * share + torch.arange(share, device=q.device)
        return q.gather(1, head.flatten(1)[..., None, None].expand_as(q))

    def form(self) -> dict[str, Any]:
        """As `KVStore.form`."""
        return super().form() | {"kind": "shared keys", "grouping": told(self.grouping)}

    def tables(self) -> dict[str, Table]:
        """As `KVStore.tables`, with that of the keys."""
        return super().tables() | {KEYS: self.table.keys}

    def notes(self) -> dict[str, Tensor]:
        """As `KVStore.notes`, with the clusters and what is known of those to come."""
        early = {} if self.early is None else {"early": self.early}
        return super().notes() | {"leader": self.table.leader, "noted": self.noted, "grouped": self.grouped} | early

    def take_notes(self, parcel: Parcel, counts: dict[str, Tensor]) -> None:
        """As `KVStore.take_notes`; heads that share have as many tokens, and their leader's keys are there."""
        super().take_notes(parcel, counts)
        lengths, warmup = counts[TOKENS], self.grouping.warmup
        leader = parcel.take("leader", lengths.shape, torch.int64)
        self.noted = parcel.take("noted", self.seen.shape, torch.int64)
        self.grouped = parcel.take("grouped", self.seen.shape, torch.bool)
        self.waiting = not bool(self.grouped.all())
        if self.waiting and ("early" in parcel or bool(self.noted.any())):
            self.early = parcel.take("early", (len(lengths), None, warmup, self.dims[0]), None)
            if self.early.shape[1] % max(1, lengths.shape[1]):
                raise ValueError(f"'early' of {self.early.shape[1]} heads: expected a multiple of {lengths.shape[1]}")
        own = torch.arange(lengths.shape[1], device=lengths.device)
        inside = bool(((leader >= 0) & (leader < len(own))).all())
        if not inside or not torch.equal(leader.gather(1, leader), leader):
            raise ValueError(f"'leader': expected heads 0 to {len(own) - 1} that read their own keys")
        if bool((leader != own)[~self.grouped].any()):
            raise ValueError("'leader': expected each head to lead itself where clusters are not found yet")
        if not torch.equal(lengths.gather(1, leader), lengths):
            raise ValueError("'leader': expected heads with as many tokens as those they lead")
        if not torch.equal(counts[KEYS], lengths.masked_fill(leader != own, 0)):
            raise ValueError("'keys.lengths': expected keys of heads that lead, and of no others")
        if bool((self.noted < 0).any() | (self.noted > warmup).any()):
            raise ValueError(f"'noted': expected 0 to {warmup} tokens")
        self.table.share(leader)

    def _start(self, k: Tensor, v: Tensor, present: Tensor | None) -> None:
        super()._start(k, v, present)
        layout, (batch, heads) = self.table.layout, k.shape[:2]
        own, others = without_keys(layout, keys=True), without_keys(layout)
        leader = torch.arange(heads, device=k.device).repeat(batch, 1)
        keys = PageTable(Arena(own.nbytes, k.device), own, batch, heads)
        self.table = SharedKeyTable(Arena(others.nbytes, k.device), layout, keys, leader)
        self.noted = torch.zeros(batch, dtype=torch.int64, device=k.device)
        self.grouped = torch.zeros(batch, dtype=torch.bool, device=k.device)


__all__ = ["Grouping", "SharedKeyStore", "SharedKeyTable", "without_keys"]
