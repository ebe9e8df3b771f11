"""Arena: equal pages of raw memory that grow on demand and leave the process when they are given back."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from saccade.mechanisms.cache.mapping import Mapping

RESERVED = 256 * 2**20
"""Address space, in bytes, that an arena on a Linux host starts with; it costs nothing before it is written to."""

GROWTH = 8
"""How much larger the next reservation is."""

STRETCH = 16 * 2**20
"""Bytes that are moved at a time when an arena outgrows its reservation, each stretch freed before the next."""

FILLED = 2**20
"""Bytes of a page up to which it counts as soon full: larger ones may be reservations, of which a part is written."""

COUNTED = mmap.PAGESIZE
"""`users` has a multiple of so many places, which end where a page of the system does."""


class Arena:
    """Pages of raw memory; page p is row p of `bytes`. Tables name pages, and a page lives while one names it.

    On a Linux host address space is reserved ahead: a page takes memory once it is written to, and gives it back to
    the system at once when the last table lets go of it (`madvise`). Elsewhere one tensor is allocated as it is needed,
    and pages that were given back are only used again.

    Args:
        page_nbytes: Size of a page.
        device: Where the pages lie.

    Attributes:
        bytes: uint8 `[capacity, page_nbytes]`; another tensor after `take` has outgrown it.
        users: int64 on the host: how often tables name each page; pages past its end were never used.
        shared: How many times a page is named beyond its first.
        mapping: What `bytes` is a view of, where memory can be given back; else None.
    """

    def __init__(self, page_nbytes: int, device: torch.device) -> None:
        self.page_nbytes = page_nbytes
        self.device = device
        self.shared = 0
        self._free: list[int] = []
        self._high = 0
        self.mapping: Mapping | None = None
        self.users = torch.zeros(0, dtype=torch.int64)
        self.bytes = torch.empty(0, page_nbytes, dtype=torch.uint8, device=device)

    @property
    def pages(self) -> int:
        """Pages that some table names."""
        return self._high - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: of the pages in use, or without `madvise` of all that were ever needed at once."""
        return (self.pages if self.mapping is not None else len(self.bytes)) * self.page_nbytes

    def take(self, count: int) -> Tensor:
        """Pages for a table that nobody else names.

        Args:
            count: How many.

        Returns:
            int64 `[count]` on the host; what is in them is arbitrary.

        Raises:
            MemoryError: If there is no memory for them; nothing has changed then.
        """
        fresh = max(0, count - len(self._free))
        if self._high + fresh > len(self.bytes):
            self._grow(self._high + fresh)
        if self._high + fresh > len(self.users):
            room = -(-max(self._high + fresh, 2 * len(self.users)) // COUNTED) * COUNTED
            self.users = torch.nn.functional.pad(self.users, (0, room - len(self.users)))
        recycled = self._free[len(self._free) - (count - fresh) :]
        del self._free[len(self._free) - len(recycled) :]
        pages = torch.tensor([*recycled, *range(self._high, self._high + fresh)], dtype=torch.int64)
        self._expect(self._high, self._high + fresh)
        self._high += fresh
        self.users[pages] = 1
        return pages

    def share(self, pages: Tensor) -> None:
        """One more table names each of these pages (a page as often as it is listed)."""
        self.users.index_add_(0, pages.cpu(), torch.ones(len(pages), dtype=torch.int64))
        self.shared += len(pages)

    def give_back(self, pages: Tensor) -> None:
        """One table less names each of these pages (a page as often as it is listed)."""
        pages = pages.cpu()
        self.users.index_add_(0, pages, torch.full((len(pages),), -1))
        empty = pages[self.users[pages] == 0].unique()
        self.shared -= len(pages) - len(empty)
        self._free += empty.tolist()
        if self.mapping is not None:
            for start, stop in _runs(empty, self.users, self.page_nbytes):
                self.mapping.release(start * self.page_nbytes, stop * self.page_nbytes)

    def _expect(self, start: int, stop: int) -> None:
        """Pages start .. stop - 1 are about to be written throughout, unless they are reservations."""
        if self.mapping is not None and self.page_nbytes <= FILLED:
            self.mapping.expect(start * self.page_nbytes, stop * self.page_nbytes)

    def _grow(self, pages: int) -> None:
        """Reserve room for at least so many pages and move what is in use there, amortised O(1) per page."""
        old, old_map = self.bytes, self.mapping
        fresh, self.mapping = _memory(pages, self.page_nbytes, len(old), self.device)
        stretch = max(1, STRETCH // self.page_nbytes)
        for first, last in _stretches(self.users[: self._high].nonzero().flatten()):
            self._expect(first, last)
        for start in range(0, self._high, stretch):
            used = self.users[start : start + stretch].nonzero().flatten().to(self.device) + start
            fresh[used] = old[used]
            if old_map is not None:
                old_map.release(start * self.page_nbytes, min(start + stretch, self._high) * self.page_nbytes)
        self.bytes = fresh


def _memory(pages: int, page_nbytes: int, before: int, device: torch.device) -> tuple[Tensor, Mapping | None]:
    """Room for `pages` pages or more, and its mapping where memory can be given back."""
    if device.type == "cpu" and sys.platform == "linux":
        capacity = max(RESERVED // page_nbytes, GROWTH * before, pages)
        for room in (capacity, pages):  # a limit on address space may leave no more than what is needed
            try:
                mapping = Mapping(room * page_nbytes)
            except (OSError, ValueError):
                continue
            return mapping.bytes.view(room, page_nbytes), mapping
    room = max(pages, before + before // 2)
    try:
        return torch.empty(room, page_nbytes, dtype=torch.uint8, device=device), None
    except RuntimeError as error:
        raise MemoryError(f"no memory for {room * page_nbytes:,} bytes of keys and values: {error}") from error


def _runs(pages: Tensor, users: Tensor, size: int) -> Iterator[tuple[int, int]]:
    """Stretches `(start, stop)` of unused pages, `size` bytes each, that hold these sorted pages.

    They reach as far as a page of the system does, so that it goes back when the last page on it is unused.
    """
    for first, last in _stretches(pages):
        start, stop = first, last
        while start > 0 and start * size % mmap.PAGESIZE and users[start - 1] == 0:
            start -= 1
        while stop < len(users) and stop * size % mmap.PAGESIZE and users[stop] == 0:
            stop += 1
        yield start, stop


def _stretches(pages: Tensor) -> Iterator[tuple[int, int]]:
    """Stretches `(start, stop)` of consecutive numbers among these sorted pages."""
    if len(pages):
        breaks = (pages.diff() > 1).nonzero().flatten() + 1
        yield from ((int(run[0]), int(run[-1]) + 1) for run in pages.tensor_split(breaks))


__all__ = ["Arena"]
