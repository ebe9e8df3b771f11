"""TieredStore: a store whose keys and values have a second tier, and attention that fetches what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from saccade.mechanisms.cache.pool import Pool
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KEY, VALUE, KVStore
from saccade.mechanisms.cache.tieredtable import TieredArena, TieredTable, split
from saccade.mechanisms.cache.tiers import Tier, TierError
from saccade.ops import decode_attend, merge
from saccade.types import AttentionOutput, KVPages


class TieredStore(KVStore):
    """A store whose keys and values lie in a tier, as many pages as it says also in memory.

    Args:
        tier: The tier.
        storage: As in `KVStore`.
        stats: As in `KVStore`.

    Attributes:
        following: The store that is read after this one, which is fetched ahead meanwhile; None for none.
        backwards: Whether the next step that reads everything begins with the last stretch: it turns round each time,
            as what was read last is in frames.
    """

    table: TieredTable

    def __init__(self, tier: Tier, storage: Storage | None = None, stats: Sequence[str] = ()) -> None:
        super().__init__(storage, stats)
        self.tier = tier
        self.following: ReferenceType[TieredStore] | None = None
        self.backwards = False
        self._expected: Tensor | None = None

    @property
    def pool(self) -> Pool | None:
        """What is in memory; None while the store is empty."""
        return None if self.empty else self.table.arena.pool

    @property
    def away_nbytes(self) -> int:
        """Bytes of keys and values that are in the tier only."""
        return 0 if self.pool is None else self.pool.away_nbytes

    def prefetch(self) -> None:
        """Begin to fetch what the next step is expected to read: what the last one did."""
        if self.pool is not None and self._expected is not None:
            expected = self._expected
            self.pool.prefetch(expected[self.table.arena.users[expected] > 0])

    def append(self, k: Tensor, v: Tensor, present: Tensor | None = None) -> None:
        """As `KVStore.append`; `TierError` if a page that is not full cannot be read back, the store is as before."""
        lengths = self.lengths
        try:
            super().append(k, v, present)
        except TierError:
            self.table.resize(lengths)
            raise

    def pages(self) -> KVPages:
        """Refused: there is no place in memory that has them all; see `attend_tiered`."""
        raise ValueError(f"{self!r}: expected a store without a tier, whose pages can be read in place")

    def select(self, rows: Tensor) -> TieredStore:
        """As `KVStore.select`; both tiers are shared until written to."""
        other = TieredStore(self.tier, self.storage, self.stats)
        other.__dict__.update(super().select(rows).__dict__ | {"tier": self.tier})
        return other

    def view(self, pages: Tensor, entries: slice, lengths: Tensor) -> KVPages:
        """What `decode_attend` reads: some columns of the table, of which `pages`, distinct, are brought to frames."""
        pool = self.table.arena.pool
        pool.hold(pages)
        parts = self.table.frames()
        table = self.table.table[:, :, entries]
        frames = pool.frame[table.cpu().clamp(0, len(pool.frame) - 1)].clamp(min=0).to(table.device)
        scales = [parts.get(names[kind]) for kind in (1, 2) for names in (KEY, VALUE)]
        return KVPages(parts["key"], parts["value"], frames, lengths, *scales)

    def ahead(self, pages: Tensor) -> None:
        """Remember what this step reads first, and begin to fetch what the following store is expected to read."""
        self._expected = pages
        following = None if self.following is None else self.following()
        if following is not None:
            following.prefetch()

    def pages_of(self, slots: Tensor) -> Tensor:
        """Distinct pages of slots int64 `[B, L, K]`, -1 for none, on the host; L is a multiple of G."""
        batch = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
        head = torch.arange(slots.shape[1], device=slots.device) // (slots.shape[1] // self.lengths.shape[1])
        pages, _ = self.table.find((batch, head[:, None], slots.clamp(min=0)))
        return pages[slots >= 0].unique().cpu()

    def used(self, entries: slice) -> Tensor:
        """Distinct pages of some columns of the table, on the host."""
        columns = torch.arange(self.table.table.shape[2], device=self.lengths.device)[entries]
        inside = columns * self.storage.page < self.lengths[..., None]
        return self.table.table[:, :, entries][inside].unique().cpu()

    def _start(self, k: Tensor, v: Tensor, present: Tensor | None) -> None:
        super()._start(k, v, present)
        layout = self.table.layout
        far = split(layout, near=False)
        backing = self.tier.backing(far.nbytes, k.device)
        pool = Pool(far, backing, self.tier.resident, k.device, ahead=self.tier.ahead)
        arena = TieredArena(split(layout, near=True).nbytes, pool)
        self.table = TieredTable(arena, layout, *k.shape[:2])


def attend_tiered(q: Tensor, store: TieredStore, slots: Tensor | None, **options: Any) -> AttentionOutput:
    """`decode_attend` of one query over a tiered store: what it reads is fetched, all at once or a stretch at a time.

    Args:
        q: `[B, H, 1, D]`, times the store's channels where it has some.
        store: With tokens, not in 2 bits.
        slots: int64 `[B, G or H, K]`, whose pages are all in frames for this step; or None for all, in stretches of
            half the frames, the next fetched while one is attended to.
        **options: As for `decode_attend`.

    Returns:
        `out` and `lse`, of what is stored.
    """
    pool, size = store.table.arena.pool, store.storage.page
    if slots is not None:
        pages = store.pages_of(slots)
        cache = store.view(pages, slice(None), store.lengths)
        store.ahead(pages)
        result = _decode(q, cache, slots=slots, **options)
        pool.trim()
        return result
    count = -(-len(store) // size)
    step = max(1, pool.limit // 2 // store.lengths.numel())
    stretches = [slice(first, min(first + step, count)) for first in range(0, count, step)]
    if store.backwards:
        stretches.reverse()
    results, coming = [], store.used(stretches[0])
    for entries, following in zip(stretches, [*stretches[1:], None], strict=True):
        pages = coming
        held = (store.lengths - entries.start * size).clamp(0, (entries.stop - entries.start) * size)
        cache = store.view(pages, entries, held)
        if following is None:
            store.ahead(pages)
        else:
            coming = store.used(following)
            if len(pages) + len(coming) <= pool.limit:
                pool.prefetch(coming)
        results.append(_decode(q, cache, **options))
    pool.trim()
    store.backwards = not store.backwards
    return merge(results[:: 1 if store.backwards else -1])  # in one order, so that rounding is the same


def _decode(q: Tensor, cache: KVPages, **options: Any) -> AttentionOutput:
    q = q if cache.bits is not None else q.to(cache.k.dtype)
    return decode_attend(q, cache, causal=False, return_lse=True, **options)


def fetch_ahead(stores: Sequence[KVStore]) -> None:
    """Tell tiered stores which is read after each: the next layer's, and the first for the next token."""
    for store, following in zip(stores, [*stores[1:], *stores[:1]], strict=True):
        if isinstance(store, TieredStore) and isinstance(following, TieredStore) and store is not following:
            store.following = ref(following)


def report(stores: Sequence[KVStore]) -> None:
    """Raise, once for all of them, what kept pages from being written to a tier. Nothing is lost: they are in memory.

    Args:
        stores: Of all layers.

    Raises:
        TierError: Naming the tier.
    """
    pools = [store.pool for store in stores if isinstance(store, TieredStore) and store.pool is not None]
    for pool in pools:
        pool.settle()
    troubles = [pool.trouble for pool in pools if pool.trouble is not None]
    if troubles:
        for pool in pools:
            pool.trouble, pool.told = None, True
        raise troubles[0]


__all__ = ["TieredStore", "attend_tiered", "fetch_ahead", "report"]
