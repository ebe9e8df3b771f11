"""PageTable: which pages hold the tokens of each key/value head, ragged, shared until written to."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.mechanisms.cache.arena import Arena

ALIGNMENT = 64
"""Bytes at whose multiples the parts of a page begin."""

Slots = tuple[Tensor, Tensor, Tensor]
"""Tokens by three int64 tensors of one shape: batch entry, head, and place in the head."""


class Part(NamedTuple):
    """What a page holds of each of its tokens: `width` numbers, from byte `start` on."""

    start: int
    width: int
    dtype: torch.dtype


class PageLayout:
    """Where on a page the parts of its tokens lie: one after another, each `[size, width]`.

    Args:
        parts: By name, width and dtype of what is held of each token.
        size: Tokens of a page.

    Attributes:
        nbytes: Bytes of a page.
    """

    def __init__(self, parts: dict[str, tuple[int, torch.dtype]], size: int) -> None:
        self.size = size
        self.parts: dict[str, Part] = {}
        self.nbytes = 0
        for name, (width, dtype) in parts.items():
            self.parts[name] = Part(self.nbytes, width, dtype)
            self.nbytes += -(-size * width * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def views(self, pages: Tensor) -> dict[str, Tensor]:
        """Every part of raw pages uint8 `[P, nbytes]` as a tensor `[P, size, width]` in the same memory."""
        memory = pages.untyped_storage()
        return {
            name: torch.empty(0, dtype=dtype, device=pages.device).set_(
                memory, start // dtype.itemsize,  # type: ignore[call-overload]
                (len(pages), self.size, width), (self.nbytes // dtype.itemsize, width, 1),
            )
            for name, (start, width, dtype) in self.parts.items()
        }  # fmt: skip


class PageTable:
    """A list of pages per (batch entry, key/value head), as long as its tokens need.

    Token j of (b, g) is row j % size of page `table[b, g, j // size]`.

    Args:
        arena: Where the pages come from.
        layout: What is on them.
        batch: B.
        heads: G.

    Attributes:
        table: int64 `[B, G, T]`; entries past a head's length are arbitrary.
        lengths: int64 `[B, G]`, tokens of each head.
    """

    def __init__(self, arena: Arena, layout: PageLayout, batch: int, heads: int) -> None:
        self.arena = arena
        self.layout = layout
        self.table = torch.zeros(batch, heads, 0, dtype=torch.int64, device=arena.device)
        self.lengths = torch.zeros(batch, heads, dtype=torch.int64, device=arena.device)
        self._held = layout  # of it, what the arena's pages have
        self._base: Tensor | None = None
        self._parts: dict[str, Tensor] = {}

    def __del__(self) -> None:
        """Give the pages back: other tables may go on using the arena."""
        if not sys.is_finalizing():
            self.resize(torch.zeros_like(self.lengths))

    @property
    def kept(self) -> dict[str, Part]:
        """What this table itself holds of a token, by name."""
        return self.layout.parts

    @property
    def longest(self) -> int:
        """The greatest length."""
        return int(self.lengths.max()) if self.lengths.numel() else 0

    @property
    def parts(self) -> dict[str, Tensor]:
        """Every part of all the arena's pages, views `[P, size, width]`."""
        if self._base is not self.arena.bytes:
            self._base = self.arena.bytes
            self._parts = self._held.views(self._base)
        return self._parts

    def find(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Page and row of tokens, to index a part with."""
        batch, head, token = slots
        entry = torch.div(token, self.layout.size, rounding_mode="floor")
        return self.table[batch, head, entry], token - entry * self.layout.size

    def grid(self) -> tuple[Tensor, Tensor]:
        """Page and row of every slot up to the greatest length, `[B, G, n]` and `[n]`; page 0 past a head's length."""
        token = torch.arange(self.longest, device=self.table.device)
        entry = torch.div(token, self.layout.size, rounding_mode="floor")
        pages = self.table[:, :, entry].masked_fill(token >= self.lengths[..., None], 0)
        return pages, token - entry * self.layout.size

    def whole(self, name: str) -> Tensor:
        """A part of every slot up to the greatest length, copied page by page: `[B, G, n, width]`."""
        used = self._used()
        pages = self.table[:, :, : used.shape[2]].masked_fill(~used, 0)
        return self.parts[name][:, : self._rows()][pages].flatten(2, 3)[:, :, : self.longest]

    def fill(self, name: str, x: Tensor) -> None:
        """Overwrite a part of every slot and of what lies past the end by `x` `[B, G, n, width]`, page by page."""
        used, rows = self._used(), self._rows()
        self._own(used)
        whole = torch.nn.functional.pad(x, (0, 0, 0, used.shape[2] * rows - x.shape[2]))
        into = self.parts[name][:, :rows]
        into[self.table[:, :, : used.shape[2]][used]] = whole.unflatten(2, (-1, rows))[used].to(into.dtype)

    def read(self, name: str, where: tuple[Tensor, Tensor]) -> Tensor:
        """A part of the tokens at these pages and rows, see `find`: a copy `[*their shape, width]`."""
        start, width, dtype = self._held.parts[name]
        unit = math.gcd(start, self._held.nbytes, width * dtype.itemsize)  # bytes: memory is whole rows of so many
        if unit < ALIGNMENT:
            return self.parts[name][where]
        page, row = torch.broadcast_tensors(*where)  # whole rows by one index: several times faster than by two
        units = width * dtype.itemsize // unit
        first = page * (self._held.nbytes // unit) + start // unit + row * units
        index = first[..., None] + torch.arange(units, device=first.device)
        rows = self.arena.bytes.view(-1).view(dtype).view(-1, unit // dtype.itemsize)
        return rows.index_select(0, index.flatten()).view(*first.shape, width)

    def write(self, slots: Slots, parts: dict[str, Tensor]) -> None:
        """Overwrite parts of tokens, each given as `[*shape of the slots, width]`."""
        self._own_pages_of(slots)
        where = self.find(slots)
        for name, x in parts.items():
            into = self.parts[name]
            into[where] = x.to(into.dtype)

    def move(self, sources: Slots, targets: Slots) -> None:
        """Copy whole tokens over others; all sources are read before the first is overwritten."""
        self._own_pages_of(targets)
        source, target = self.find(sources), self.find(targets)
        for part in self.parts.values():
            part[target] = part[source]

    def resize(self, lengths: Tensor) -> None:
        """Take or give back pages so that each head holds so many tokens, int64 `[B, G]`.

        Args:
            lengths: What becomes `lengths`; tokens that are new hold anything.

        Raises:
            MemoryError: If there is no memory for them; nothing has changed then.
        """
        have, need = self._pages(self.lengths), self._pages(lengths)
        if not torch.equal(have, need):
            width = int(need.max())
            if width > self.table.shape[2]:
                room = max(width, 2 * self.table.shape[2]) - self.table.shape[2]
                self.table = torch.nn.functional.pad(self.table, (0, room))
            entry = torch.arange(self.table.shape[2], device=self.table.device)
            gone = (entry >= need[..., None]) & (entry < have[..., None])
            new = (entry >= have[..., None]) & (entry < need[..., None])
            fresh = self.arena.take(int(new.sum())).to(self.table.device)
            self.arena.give_back(self.table[gone])
            self.table[new] = fresh
        self.lengths = lengths

    def select(self, rows: Tensor) -> PageTable:
        """A table of these batch entries, int64 `[n]`, repeats allowed; pages are shared until written to."""
        other = self._empty()
        other.table, other.lengths = self.table[rows], self.lengths[rows]
        used = torch.arange(other.table.shape[2], device=rows.device) < self._pages(other.lengths)[..., None]
        self.arena.share(other.table[used])
        return other

    def _empty(self) -> PageTable:
        """A table without rows that shares the memory."""
        return PageTable(self.arena, self.layout, 0, 0)

    def _used(self) -> Tensor:
        """Which entries of the table hold tokens, bool `[B, G, T]` with T those of the longest head."""
        need = self._pages(self.lengths)
        return torch.arange(-(-self.longest // self.layout.size), device=need.device) < need[..., None]

    def _rows(self) -> int:
        """Rows of a page that hold tokens: all, or as many as the longest head has where that is on one page."""
        return min(self.layout.size, max(1, self.longest))

    def _own_pages_of(self, slots: Slots) -> None:
        """As `_own`, before tokens are written to."""
        if self.arena.shared:
            entries = torch.zeros_like(self.table, dtype=torch.bool)
            entries[slots[0], slots[1], slots[2] // self.layout.size] = True
            self._own(entries)

    def _own(self, entries: Tensor) -> None:
        """Copy pages that are about to be written to where other tables, or other rows of this one, share them.

        Args:
            entries: Bool `[B, G, T]`, which entries of the table, or the first of them.
        """
        if not self.arena.shared:
            return
        entries = torch.nn.functional.pad(entries, (0, self.table.shape[2] - entries.shape[2]))
        pages = self.table[entries]
        shared = (self.arena.users[pages.cpu()] > 1).to(pages.device)
        old = pages[shared]
        pages[shared] = self.arena.take(len(old)).to(pages.device)
        self._copy(old, pages[shared])
        self.arena.give_back(old)
        self.table[entries] = pages

    def _copy(self, old: Tensor, new: Tensor) -> None:
        """Make pages `new` of what is on pages `old`."""
        self.arena.bytes[new] = self.arena.bytes[old]

    def _pages(self, lengths: Tensor) -> Tensor:
        """Pages that so many tokens need."""
        return torch.div(lengths + self.layout.size - 1, self.layout.size, rounding_mode="floor")


__all__ = ["PageLayout", "PageTable", "Slots"]
