"""TieredTable: a page table whose small parts are in memory, and whose keys and values are in a pool of frames."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.mechanisms.cache.arena import Arena
from saccade.mechanisms.cache.pagetable import PageLayout, PageTable, Slots
from saccade.mechanisms.cache.pool import Pool
from saccade.mechanisms.cache.store import KEY, VALUE


class TieredArena(Arena):
    """Pages whose small parts, positions and stats, are rows of `bytes`; their keys and values are in a pool.

    Args:
        page_nbytes: Of the small parts.
        pool: Of the others.
    """

    def __init__(self, page_nbytes: int, pool: Pool) -> None:
        super().__init__(page_nbytes, pool.frames.device)
        self.pool = pool

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, those of frames among them."""
        return super().nbytes + self.pool.frames.nbytes

    def take(self, count: int) -> Tensor:
        """As `Arena.take`."""
        pages = super().take(count)
        self.pool.add(pages)
        return pages

    def give_back(self, pages: Tensor) -> None:
        """As `Arena.give_back`; what nobody names leaves both tiers."""
        super().give_back(pages)
        distinct = pages.cpu().unique()
        self.pool.drop(distinct[self.users[distinct] == 0])


class TieredTable(PageTable):
    """A page table over a `TieredArena`: `parts` has the small ones, `read` and `write` reach all.

    Args:
        arena: Where the pages come from.
        layout: What is on them.
        batch: B.
        heads: G.
    """

    arena: TieredArena

    def __init__(self, arena: TieredArena, layout: PageLayout, batch: int, heads: int) -> None:
        super().__init__(arena, layout, batch, heads)
        self._held = split(layout, near=True)

    def frames(self) -> dict[str, Tensor]:
        """The parts in frames, views `[frames, size, width]`."""
        return self.arena.pool.layout.views(self.arena.pool.frames.bytes)

    def whole(self, name: str) -> Tensor:
        """As `PageTable.whole`, a few pages at a time."""
        if name in self._held.parts:
            return super().whole(name)
        used, part = self._used(), self.layout.parts[name]
        pages = self.table[:, :, : used.shape[2]].masked_fill(~used, -1)
        out = torch.zeros(*pages.shape, self.layout.size, part.width, dtype=part.dtype, device=pages.device)
        for places, frames in self.arena.pool.groups(pages.flatten()):
            out.view(-1, self.layout.size, part.width)[places] = self.frames()[name][frames]
        return out.flatten(2, 3)[:, :, : self.longest]

    def read(self, name: str, where: tuple[Tensor, Tensor]) -> Tensor:
        """As `PageTable.read`, a few pages at a time."""
        if name in self._held.parts:
            return super().read(name, where)
        pages, rows = (x.flatten() for x in torch.broadcast_tensors(*where))
        part = self.layout.parts[name]
        out = torch.zeros(len(pages), part.width, dtype=part.dtype, device=pages.device)
        for places, frames in self.arena.pool.groups(pages):
            out[places] = self.frames()[name][frames, rows[places]]
        return out.view(*torch.broadcast_shapes(where[0].shape, where[1].shape), part.width)

    def write(self, slots: Slots, parts: dict[str, Tensor]) -> None:
        """As `PageTable.write`, a few pages at a time."""
        far = {name: x for name, x in parts.items() if name not in self._held.parts}
        super().write(slots, {name: x for name, x in parts.items() if name in self._held.parts})
        if not far:
            return
        pages, rows = (x.flatten() for x in torch.broadcast_tensors(*self.find(slots)))
        far = {name: x.expand(*slots[0].shape, -1).reshape(len(pages), x.shape[-1]) for name, x in far.items()}
        for places, frames in self.arena.pool.groups(pages, change=True):
            views = self.frames()
            for name, x in far.items():
                views[name][frames, rows[places]] = x[places].to(views[name].dtype)

    def move(self, sources: Slots, targets: Slots) -> None:
        """As `PageTable.move`."""
        source = self.find(sources)
        self.write(targets, {name: self.read(name, source) for name in self.layout.parts})

    def _empty(self) -> TieredTable:
        return TieredTable(self.arena, self.layout, 0, 0)

    def _copy(self, old: Tensor, new: Tensor) -> None:
        super()._copy(old, new)
        self.arena.pool.copy(old.cpu(), new.cpu())


def split(layout: PageLayout, *, near: bool) -> PageLayout:
    """The layout of what always is in memory, or of the keys and values with their scales."""
    far = set(KEY + VALUE)
    return PageLayout(
        {name: (part.width, part.dtype) for name, part in layout.parts.items() if (name in far) != near}, layout.size
    )


__all__ = ["TieredArena", "TieredTable", "split"]
