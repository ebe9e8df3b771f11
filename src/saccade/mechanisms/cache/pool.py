"""Pool: frames in the device's memory for some of a store's pages, the others lie in a tier's backing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future

import torch
from torch import Tensor

from saccade.mechanisms.cache.arena import Arena
from saccade.mechanisms.cache.pagetable import PageLayout
from saccade.mechanisms.cache.tiers import Backing, TierError, fetcher

LEAST = 16
"""Frames that a pool may always keep."""

PORTION = 4 * 2**20
"""Most bytes that are copied between frames and backing at once."""


class Pool:
    """What of pages 0, 1, .. is in frames. Pages that were changed are written back when they lose their frame.

    Every method first waits for what `prefetch` has begun, so that frames never change under a reader.

    Args:
        layout: What is on a page.
        backing: Where pages without a frame lie.
        resident: Part of the pages that keeps frames.
        device: Where the frames are.
        ahead: Whether `prefetch` does anything.

    Attributes:
        frames: The memory; row f is frame f.
        frame: int64 `[capacity]` on the host, the frame of each page, -1 for none.
        fetched: Bytes read from the backing.
        written: Bytes written to it.
        trouble: Why pages could not be written back: they keep their frames. None once it was told.
        told: Whether it was, since the last that could be written.
    """

    def __init__(
        self, layout: PageLayout, backing: Backing, resident: float, device: torch.device, *, ahead: bool = True
    ) -> None:
        self.layout = layout
        self.backing = backing
        self.resident = resident
        self.ahead = ahead
        self.frames = Arena(layout.nbytes, device)
        self.frame = torch.zeros(0, dtype=torch.int64)
        self.fetched = self.written = 0
        self.trouble: TierError | None = None
        self.told = False
        self._last = torch.zeros(0, dtype=torch.int64)  # when each page was asked for
        self._kept = torch.zeros(0, dtype=torch.bool)  # whether the backing has it
        self._changed = torch.zeros(0, dtype=torch.bool)  # whether its frame says something else
        self._live = torch.zeros(0, dtype=torch.bool)  # whether a table names it
        self._used = 0
        self._time = 0
        self._coming: Future[None] | None = None

    @property
    def limit(self) -> int:
        """Frames that are kept between steps."""
        return max(LEAST, math.ceil(self.resident * self._used))

    @property
    def away_nbytes(self) -> int:
        """Bytes of pages that are in no frame."""
        return (self._used - self.frames.pages) * self.layout.nbytes

    def add(self, pages: Tensor) -> None:
        """Pages, int64 `[n]`, that are new: what is on them is arbitrary."""
        self.settle()
        room = int(pages.max()) + 1 - len(self.frame) if len(pages) else 0
        if room > 0:
            room = max(room, len(self.frame))
            self.frame, self._last = (torch.nn.functional.pad(x, (0, room), value=-1) for x in (self.frame, self._last))
            self._kept, self._changed, self._live = (
                torch.nn.functional.pad(x, (0, room)) for x in (self._kept, self._changed, self._live)
            )
        self._live[pages] = True
        self._used += len(pages)

    def drop(self, pages: Tensor) -> None:
        """Pages that nobody names any more."""
        self.settle()
        held = self.frame[pages]
        self.frames.give_back(held[held >= 0])
        self.backing.drop(pages[self._kept[pages]])
        self.frame[pages], self._kept[pages], self._changed[pages], self._live[pages] = -1, False, False, False
        self._used -= len(pages)

    def hold(self, pages: Tensor, *, change: bool = False) -> Tensor:
        """Frames of distinct pages, fetched if need be: good until the next call.

        Args:
            pages: int64 `[n]`, ascending; may be more than `limit`.
            change: Whether what is on them is about to change.

        Returns:
            int64 `[n]`.

        Raises:
            TierError: If one cannot be read back; nothing has changed then.
        """
        self.settle()
        self._bring(pages)
        spare = self.limit // 2
        if len(self.frames.bytes) - self.frames.pages < spare:  # for `prefetch`, under whom frames must not move
            self.frames.give_back(self.frames.take(spare))
        if change:
            self._changed[pages] = True
        return self.frame[pages]

    def prefetch(self, pages: Tensor) -> None:
        """Begin to fetch distinct ascending pages, `limit / 2` at most, in a thread.

        What was held last stays in its frames if that and `pages` together are at most `limit`.
        """
        self.settle()
        if not self.ahead:
            return
        pages = pages[: self.limit // 2]
        missing = int((self.frame[pages] < 0).sum())
        if 0 < missing <= len(self.frames.bytes) - self.frames.pages:
            self._coming = fetcher().submit(self._fetch, pages)

    def settle(self) -> None:
        """Wait for what `prefetch` has begun; if it failed, whoever needs the pages will be told."""
        if self._coming is not None:
            coming, self._coming = self._coming, None
            if not coming.cancel():
                coming.exception()

    def trim(self) -> None:
        """Take frames from the pages asked for longest ago, down to `limit`."""
        self.settle()
        self.frames.give_back(self._release(self.frames.pages - self.limit, torch.zeros(0, dtype=torch.int64)))

    def copy(self, old: Tensor, new: Tensor) -> None:
        """Make pages `new`, all distinct, of what is on pages `old`."""
        for start in range(0, len(old), max(1, self.limit // 2)):
            source, target = (x[start : start + max(1, self.limit // 2)] for x in (old, new))
            pages = torch.cat([source, target]).unique()
            self.hold(pages)
            frames = [self.frame[x].to(self.frames.device) for x in (source, target)]
            self.frames.bytes[frames[1]] = self.frames.bytes[frames[0]]
            self._changed[target] = True
            self.trim()

    def groups(self, pages: Tensor, *, change: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """All places of a list of pages, repeats allowed, a few pages at a time.

        Args:
            pages: int64 `[n]`; places of what is no page are left out.
            change: As in `hold`.

        Yields:
            Places in the list, and the frames of the pages there, on the device of the list; good until the next.
        """
        device, pages = pages.device, pages.cpu()
        known = ((pages >= 0) & (pages < len(self._live))).nonzero().flatten()
        known = known[self._live[pages[known]]]
        distinct, which = pages[known].unique(return_inverse=True)
        order, step = which.argsort(), self.limit
        ends = torch.searchsorted(which[order], torch.arange(0, len(distinct) + step, step))
        for number, start in enumerate(range(0, len(distinct), step)):
            places = known[order[ends[number] : ends[number + 1]]]
            self.hold(distinct[start : start + step], change=change)
            yield places.to(device), self.frame[pages[places]].to(device)
        self.trim()

    def _fetch(self, pages: Tensor) -> None:
        """`_bring` in a thread, which does not inherit the mode that tensors were made in."""
        with torch.inference_mode():
            self._bring(pages)

    def _bring(self, pages: Tensor) -> None:
        """Give each of these pages a frame with what is on it: one of those that others lose, or a new one."""
        missing = pages[self.frame[pages] < 0]
        spare = self._release(self.frames.pages + len(missing) - self.limit, pages)
        size = max(1, PORTION // self.layout.nbytes)
        try:
            for start in range(0, len(missing), size):
                some = missing[start : start + size]
                kept = some[self._kept[some]]
                rows = self.backing.read(kept) if len(kept) else None
                fresh = self.frames.take(max(0, len(some) - len(spare)))
                self.frame[some] = torch.cat([spare[: len(some)], fresh])
                spare = spare[len(some) :]
                if rows is not None:
                    frames = self.frame[kept].to(self.frames.device)
                    _words(self.frames.bytes)[frames] = _words(rows.to(self.frames.device))
                    self.fetched += rows.nbytes
        finally:
            self.frames.give_back(spare)
        self._time += 1
        self._last[pages] = self._time

    def _release(self, count: int, wanted: Tensor) -> Tensor:
        """Take up to `count` frames from pages that are not `wanted`, asked for longest ago first, and return them."""
        if count <= 0:
            return torch.zeros(0, dtype=torch.int64)
        lost = []
        free = self.frame >= 0
        free[wanted] = False
        pages = free.nonzero().flatten()
        if len(pages) > count:
            pages = pages[self._last[pages].argsort(stable=True)[:count]].sort().values
        size = max(1, PORTION // self.layout.nbytes)
        for going in pages.split(size):
            changed = going[self._changed[going]]
            try:
                if len(changed):
                    self.backing.write(changed, self.frames.bytes[self.frame[changed].to(self.frames.device)].cpu())
            except TierError as error:
                if not self.told:
                    self.trouble, self.told = error, True
            else:
                self._kept[changed], self._changed[changed], self.told = True, False, False
                self.written += len(changed) * self.layout.nbytes
            safe = going[~self._changed[going]]
            lost.append(self.frame[safe])
            self.frame[safe] = -1
        return torch.cat(lost)


def _words(rows: Tensor) -> Tensor:
    """Rows of bytes as words of eight, where they are whole ones: eight times fewer to copy one by one."""
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows


__all__ = ["Pool"]
