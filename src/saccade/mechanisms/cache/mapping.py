"""Mapping: address space that takes memory as it is written to, in large pages where it is written throughout."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import torch

_LARGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


def large_page() -> int:
    """Bytes of the system's large pages; 0 where it has none or cannot be asked for them."""
    if not (hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")):
        return 0
    try:
        return int(_LARGE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


class Mapping:
    """Bytes of a Linux process that cost nothing before they are written to and can be given back at once.

    Reading scattered rows is bound by the translation of their addresses: a large page needs one where 512 small ones
    need as many. A large page is memory as a whole, so that one is asked for only where all of it is about to be used,
    and is broken up as soon as a part of it is not.

    Args:
        nbytes: How many.

    Attributes:
        bytes: uint8 `[nbytes]`, zeros at first.

    Raises:
        OSError: If there is no address space for them.
    """

    def __init__(self, nbytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self._map = mmap.mmap(-1, nbytes, flags=flags)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._size = large_page()
        self._first = -self.bytes.data_ptr() % self._size if self._size else 0
        self._large: set[int] = set()  # numbers of the large pages asked for; number n begins at _first + n * _size

    def expect(self, start: int, stop: int) -> None:
        """Bytes start .. stop - 1 are about to be written, all of them: large pages within them are asked for."""
        if not self._size:
            return
        first, last = -((self._first - start) // self._size), (stop - self._first) // self._size
        first = max(first, 0)
        if first < last and self._advise(mmap.MADV_HUGEPAGE, first, last):
            self._large.update(range(first, last))

    def release(self, start: int, stop: int) -> None:
        """Give the system's pages that lie within bytes start .. stop - 1 back to it; what was there is lost."""
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if start >= stop:
            return
        if self._large:
            self._break_up(start, stop)
        self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _break_up(self, start: int, stop: int) -> None:
        """Make small pages of the large ones that these bytes touch: what is written there later takes small ones."""
        numbers = range((start - self._first) // self._size, -(-(stop - self._first) // self._size))
        for number in self._large.intersection(numbers):
            begin = self._first + number * self._size
            end = begin + self._size
            if begin < start or stop < end:  # of a part the system would keep the memory: this advice splits the page
                low = max(begin, start)
                with contextlib.suppress(OSError):
                    self._map.madvise(mmap.MADV_FREE, low, min(end, stop) - low)
            self._advise(mmap.MADV_NOHUGEPAGE, number, number + 1)
            self._large.discard(number)

    def _advise(self, advice: int, first: int, last: int) -> bool:
        """Whether the system took the advice on large pages first .. last - 1."""
        try:
            self._map.madvise(advice, self._first + first * self._size, (last - first) * self._size)
        except OSError:  # it is advice: everything works without, slower
            return False
        return True


__all__ = ["Mapping", "large_page"]
