"""Tiers: the second place where pages of keys and values lie, behind a pool of frames in the memory of the device.

Why frames rather than a memory-mapped file under the arena, which would need no pool (engines would read the mapping):
a mapping that cannot be filled or read back kills the process with a signal, a read or write here is an error that can
be told; memory held is a number of frames, not what the system's read-ahead left mapped; and the same pool serves an
accelerator. What it costs is one copy of each page that is fetched.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from saccade.mechanisms.cache.arena import Arena
from saccade.mechanisms.checks import require


class TierError(OSError):
    """Pages could not be brought to a tier, or back from it."""


class Backing(Protocol):
    """Where pages lie that are in no frame: rows of bytes by number of the page."""

    def write(self, pages: Tensor, rows: Tensor) -> None:
        """Keep uint8 `[n, page_nbytes]`, on the host, under these numbers, int64 `[n]`, ascending."""

    def read(self, pages: Tensor) -> Tensor:
        """What was kept, uint8 `[n, page_nbytes]` on the host."""

    def drop(self, pages: Tensor) -> None:
        """Forget pages, all of which were kept."""


@dataclass(frozen=True)
class Tier(ABC):
    """Where a store's pages live that steps do not read: `PagedCache(model, policy, tier=Disk("/scratch"))`.

    Keys and values lie in pages of the tier; as many as `resident` says, those read last, are also in frames in the
    memory of the device. Positions and stats, some bytes a token, always are. A step first fetches what it reads and
    has no frame; while it computes, a thread fetches what the next layer is expected to read.

    Args:
        resident: Part of the pages that keeps frames between steps.
        ahead: Whether a thread fetches what is expected to be read next; without it a step waits for all it lacks.
    """

    resident: float = field(default=0.25, kw_only=True)
    ahead: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        require(0 < self.resident <= 1, "resident", self.resident, "a part of the pages, above 0 and at most 1")

    @abstractmethod
    def backing(self, page_nbytes: int, device: torch.device) -> Backing:
        """A place for pages of this size; `device` is where their frames are."""


@dataclass(frozen=True)
class Disk(Tier):
    """Pages in a nameless file, which no other program can open and which goes when its cache does.

    Args:
        path: A directory on the disk that shall hold it.
        resident: As in `Tier`.
        ahead: As in `Tier`.
    """

    path: str | os.PathLike[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(Path(self.path).is_dir(), "path", str(self.path), "a directory that exists")

    def backing(self, page_nbytes: int, device: torch.device) -> Backing:  # noqa: ARG002
        """A new file."""
        return PageFile(self.path, page_nbytes)


@dataclass(frozen=True)
class Host(Tier):
    """Pages in the host's memory, for stores on an accelerator."""

    def backing(self, page_nbytes: int, device: torch.device) -> Backing:
        """An arena; refused where the frames would lie in the same memory."""
        require(
            device.type != "cpu", "device", str(device), "an accelerator: a cache on the CPU is on the host already"
        )
        return HostPages(page_nbytes)


class PageFile:
    """Pages in a file, page p at byte p * page_nbytes.

    Args:
        path: Directory.
        page_nbytes: Size of a page.
    """

    def __init__(self, path: str | os.PathLike[str], page_nbytes: int) -> None:
        self.path = str(path)
        self.page_nbytes = page_nbytes
        self._end = 0
        try:
            self.file = tempfile.TemporaryFile(dir=path, buffering=0)  # noqa: SIM115  lives as long as this
        except OSError as error:
            raise TierError(f"path={self.path!r}: cannot hold a file for keys and values: {error}") from error

    def write(self, pages: Tensor, rows: Tensor) -> None:
        """Write runs of pages whole; see `Backing`.

        Args:
            pages: int64 `[n]`, ascending.
            rows: uint8 `[n, page_nbytes]`.

        Raises:
            TierError: If not all could be written, as on a full disk; those pages hold anything then.
        """
        source = memoryview(rows.flatten().numpy())  # type: ignore[arg-type]
        for first, stop, page in _runs(pages):
            part, place = source[first * self.page_nbytes : stop * self.page_nbytes], page * self.page_nbytes
            try:
                self._expect_whole()
                while part:
                    count = os.pwrite(self.file.fileno(), part, place)
                    part, place = part[count:], place + count
                    self._end = max(self._end, place)
            except OSError as error:
                raise TierError(
                    f"path={self.path!r}: no room for {len(part):,} more bytes of keys and values ({error}); they stay "
                    "in memory until there is"
                ) from error

    def read(self, pages: Tensor) -> Tensor:
        """See `Backing`.

        Args:
            pages: int64 `[n]`, ascending.

        Returns:
            Copies.

        Raises:
            TierError: If the file cannot be read, or was cut off.
        """
        rows = torch.empty(len(pages), self.page_nbytes, dtype=torch.uint8)
        target = memoryview(rows.view(-1).numpy())  # type: ignore[arg-type]
        try:
            self._expect_whole()
            for first, stop, page in _runs(pages):
                part, place = target[first * self.page_nbytes : stop * self.page_nbytes], page * self.page_nbytes
                while part:
                    count = os.preadv(self.file.fileno(), [part], place)
                    if count == 0:
                        self._expect_whole(place + len(part))
                    part, place = part[count:], place + count
        except OSError as error:
            raise TierError(f"path={self.path!r}: keys and values cannot be read back: {error}") from error
        return rows

    def _expect_whole(self, end: int = 0) -> None:
        """Refuse a file that was cut off: what is missing would be written or read as zeros later."""
        size, end = os.fstat(self.file.fileno()).st_size, max(end, self._end)
        if size < end:
            raise OSError(f"the file was cut off, it has {size:,} bytes, expected {end:,}")

    def drop(self, pages: Tensor) -> None:
        """Nothing is done: the file's room is used again when the page's number is."""


class HostPages:
    """Pages in the host's memory.

    Args:
        page_nbytes: Size of a page.
    """

    def __init__(self, page_nbytes: int) -> None:
        self.arena = Arena(page_nbytes, torch.device("cpu"))
        self._row = torch.zeros(0, dtype=torch.int64)

    def write(self, pages: Tensor, rows: Tensor) -> None:
        """See `Backing`."""
        most = int(pages.max()) + 1
        if most > len(self._row):
            self._row = torch.nn.functional.pad(self._row, (0, 2 * most - len(self._row)), value=-1)
        new = pages[self._row[pages] < 0]
        self._row[new] = self.arena.take(len(new))
        self.arena.bytes[self._row[pages]] = rows

    def read(self, pages: Tensor) -> Tensor:
        """See `Backing`."""
        return self.arena.bytes[self._row[pages]]

    def drop(self, pages: Tensor) -> None:
        """See `Backing`; the memory returns at once."""
        self.arena.give_back(self._row[pages])
        self._row[pages] = -1


def _runs(pages: Tensor) -> list[tuple[int, int, int]]:
    """Stretches first .. stop - 1 of ascending pages whose numbers follow each other, and the first number."""
    if len(pages) == 0:
        return []
    starts = [0, *(((pages.diff() != 1).nonzero().flatten() + 1).tolist()), len(pages)]
    return [(a, b, int(pages[a])) for a, b in pairwise(starts)]


@cache
def fetcher() -> ThreadPoolExecutor:
    """The thread that fetches ahead, one for all caches."""
    return ThreadPoolExecutor(1, thread_name_prefix="saccade-fetch")


__all__ = ["Backing", "Disk", "Host", "HostPages", "PageFile", "Tier", "TierError", "fetcher"]
