"""vAttention: each head's tokens are contiguous in a reserved range of addresses, memory comes as they do."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache.base import CachePolicy
from saccade.mechanisms.cache.saving import TOKENS, Parcel
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern


class ContiguousStore(KVStore):
    """A store with one page per head, as long as a sequence may get, of which only what was written takes memory.

    Args:
        storage: With that page.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: whole pages of the system for each part of each head."""
        if self.table.arena.mapping is None:
            return super().nbytes
        held = 0
        for part in self.table.layout.parts.values():
            used = self.lengths * part.width * part.dtype.itemsize
            held += int((torch.div(used + mmap.PAGESIZE - 1, mmap.PAGESIZE, rounding_mode="floor")).sum())
        return held * mmap.PAGESIZE

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of addresses that the tokens may grow into."""
        return self.table.arena.pages * self.table.arena.page_nbytes

    def append(self, k: Tensor, v: Tensor, present: Tensor | None = None) -> None:
        """As `KVStore.append`; refused past the reservation, which is what keeps a head's tokens contiguous."""
        self._refuse_beyond(len(self) + k.shape[2] if k.ndim == 4 else 0)
        super().append(k, v, present)

    def take_notes(self, parcel: Parcel, counts: dict[str, Tensor]) -> None:
        """As `KVStore.take_notes`; refused past the reservation."""
        super().take_notes(parcel, counts)
        self._refuse_beyond(int(counts[TOKENS].max()))

    def _refuse_beyond(self, tokens: int) -> None:
        if tokens > self.storage.page:
            raise ValueError(f"{tokens:,} tokens: expected at most {self.storage.page:,}, for which addresses are kept")

    def select(self, rows: Tensor) -> KVStore:
        """As `KVStore.select`, but copied: pages that are shared would be copied whole, reservation and all."""
        other = ContiguousStore(self.storage, self.stats)
        if self.empty:
            return other
        rows = rows.to(self.seen.device)
        k, v = (torch.empty(0, self.lengths.shape[1], 0, d, dtype=self.dtype, device=rows.device) for d in self.dims)
        other._start(k, v, None)
        other.table = type(self.table)(other.table.arena, other.table.layout, len(rows), self.lengths.shape[1])
        other.table.resize(self.lengths[rows])
        for name in self.table.layout.parts:
            other.table.fill(name, self.table.whole(name)[rows])
        other.seen, other.ordered, other.changes = self.seen[rows], self.ordered, self.changes
        other.derived = self._derived_of(rows)
        return other

    def evict(self, keep: Tensor) -> None:
        """As `KVStore.evict`; the memory past each head's new end goes back to the system."""
        before = self.lengths
        super().evict(keep)
        arena = self.table.arena
        if arena.mapping is None or arena.shared:
            return
        for batch, head in (self.lengths < before).nonzero().tolist():
            if self.lengths[batch, head] > 0:
                base = int(self.table.table[batch, head, 0]) * arena.page_nbytes
                for part in self.table.layout.parts.values():
                    first, stop = (int(x[batch, head]) * part.width * part.dtype.itemsize + part.start + base
                                   for x in (self.lengths, before))  # fmt: skip
                    arena.mapping.release(first, -(-stop // mmap.PAGESIZE) * mmap.PAGESIZE)

    def view(self, name: str) -> Tensor:
        """A part of all tokens in place, `[B, G, n, width]`: what a kernel reads that knows nothing of pages.

        Args:
            name: "key" or "value", or another part.

        Returns:
            No copy: strides, because heads are a reservation apart. Past a head's length anything.

        Raises:
            ValueError: If the heads are not in order, as after beams were reordered.
        """
        batch, heads = self.lengths.shape
        pages = self.table.table[:, :, 0].flatten()
        if not torch.equal(pages, pages[0] + torch.arange(batch * heads, device=pages.device)):
            raise ValueError(f"view: {self!r} has heads in another order than that of its memory, expected a fresh one")
        part = self.table.parts[name][int(pages[0]) : int(pages[0]) + batch * heads]
        return part.unflatten(0, (batch, heads))[:, :, : len(self)]


@register(
    "vattention",
    Kind.CACHE_POLICY,
    summary="Keys and values are contiguous in reserved addresses, memory is mapped as tokens come: no page table.",
    papers=("vAttention: Dynamic Memory Management for Serving LLMs without PagedAttention",),
    year=2024,
    code="microsoft/vattention",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa", "streaming"}),
    training_free=True,
    exact_when="always",
    complexity="N",
    effects=frozenset({"mapping"}),
    deviations=(
        (
            "The paper maps GPU memory by hand, through the driver's calls and pages of 2 MiB (64 KiB with its patched "
            "driver); here the system maps its own pages, of 4 KiB, at the first write: what the paper sets out to "
            "imitate. On an accelerator all of the reservation would be taken at once."
        ),
        "Memory goes back when tokens are evicted or the store goes, not later as the paper's deferred reclamation.",
        "Mapping is not done ahead by a thread: a fault on a new page costs a microsecond here, not a driver's call.",
    ),
    example={"tokens": 4096},
    exact=lambda n: {"tokens": 2 * n},
)
@dataclass(frozen=True)
class VAttention(CachePolicy):
    """Token j of a head is at start + j * width: any attention kernel reads `store.view("key")` and `view("value")`.

    Args:
        tokens: The longest sequence, for which addresses are reserved.
    """

    tokens: int = 131_072

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1 token")

    def storage(self) -> Storage:
        """One page per head, with its parts at whole pages of the system."""
        return Storage(page=-(-self.tokens // mmap.PAGESIZE) * mmap.PAGESIZE)

    def store(self) -> ContiguousStore:
        """An empty one."""
        return ContiguousStore(self.storage())
