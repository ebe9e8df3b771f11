"""How a layout is cut into batches of equal shape: the plan of the eager engine.

A row of a layout (one query block) is cut into parts: its entries without a mask and those with one, each at most so
many blocks long. Parts of equal length form a batch, whatever row they come from; their results merge through the lse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.types import BlockLayout
from saccade.types.bits import unpack_bits

CROWDED = 4
"""A row with more than one masked block in so many runs whole with a mask."""


@dataclass(frozen=True)
class Piece:
    """Parts of `n` different rows, each of `c` entries, times the copies (batch, group) that share the pattern.

    Args:
        entries: int64 `[n, c]`, places in the layout's entries.
        query_blocks: int64 `[n, copies, stack]`, places in `[B * H * query_blocks]`; the `stack` query heads read the
            same keys.
        key_blocks: int64 `[n, copies, c]`, places in `[B * G * key_blocks]`.
        masked: Whether some entry is bit-masked or cut by the ragged edge of the keys.
        merged: Whether an earlier piece may hold another part of the same rows.
    """

    entries: Tensor
    query_blocks: Tensor
    key_blocks: Tensor
    masked: bool
    merged: bool


@dataclass(frozen=True)
class Sharing:
    """Which query and key blocks a row of the layout stands for: B, H, G against its own `batch` and `heads`."""

    layout: BlockLayout
    batch: int
    heads: int
    groups: int

    @property
    def stack(self) -> int:
        """Query heads that read the same gathered keys: those of a group if the pattern is shared by the heads."""
        return self.heads // self.groups if self.layout.heads == 1 else 1

    @property
    def copies(self) -> int:
        """How often a row's pattern is used, on different keys."""
        batch = self.batch if self.layout.batch == 1 else 1
        return batch * (self.groups if self.layout.heads == 1 else 1)

    def places(self, rows: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
        """Query blocks `[n, copies, stack]` and first key block `[n, copies]` of rows `[n]` and copies `[c]`."""
        layout, ratio = self.layout, self.heads // self.groups
        block = rows % layout.query_blocks
        head, batch = rows // layout.query_blocks % layout.heads, rows // layout.query_blocks // layout.heads
        shared = self.groups if layout.heads == 1 else 1
        which_batch = batch[:, None] + copies // shared if layout.batch == 1 else batch[:, None]
        if layout.heads == 1:
            group = (copies % shared).expand(len(rows), -1)
            query_head = group[..., None] * ratio + torch.arange(ratio, device=rows.device)
        else:
            group = (head // ratio)[:, None]
            query_head = head[:, None, None]
        query_blocks = (which_batch[..., None] * self.heads + query_head) * layout.query_blocks + block[:, None, None]
        return query_blocks, (which_batch * self.groups + group) * layout.key_blocks


def pieces(sharing: Sharing, tile_bytes: int, item_bytes: int, budget: int) -> Iterator[Piece]:
    """Cut the layout so that each piece costs about `budget` bytes at most (one block of one row at least).

    Args:
        sharing: The layout and the sizes it serves.
        tile_bytes: What one entry of one copy costs.
        item_bytes: What one part of one copy costs beside its entries.
        budget: Bytes.

    Yields:
        Each piece.
    """
    layout = sharing.layout
    longest = max(1, (budget - item_bytes) // tile_bytes)
    rows, total = layout.rows, len(layout.indptr) - 1
    copies = torch.arange(sharing.copies, device=layout.device)
    for chosen, masked, merged in _classes(layout, rows):
        for part_rows, entries, first in _equal_parts(chosen, rows[chosen], total, longest):
            count = max(1, budget // (item_bytes + tile_bytes * entries.shape[1]))
            some_copies, some_rows = min(count, len(copies)), max(1, count // len(copies))
            query_blocks, start = sharing.places(part_rows, copies)
            key_blocks = start[..., None] + layout.indices[entries].long()[:, None]
            for row in range(0, len(part_rows), some_rows):
                for copy in range(0, len(copies), some_copies):
                    here = (slice(row, row + some_rows), slice(copy, copy + some_copies))
                    yield Piece(entries[here[0]], query_blocks[here], key_blocks[here], masked, merged or not first)


def _classes(layout: BlockLayout, rows: Tensor) -> Iterator[tuple[Tensor, bool, bool]]:
    """Entries by treatment: `(entries, masked, merged)`.

    Masks cost time, so the masked entries of a row run apart and are merged, unless they are many.
    """
    masked = layout.kinds >= 0
    if layout.keys % layout.block[1]:
        masked = masked | (layout.indices == layout.key_blocks - 1)
    masked_count = torch.bincount(rows[masked], minlength=len(layout.indptr) - 1)
    crowded = (masked_count * CROWDED > layout.indptr.diff())[rows]
    yield (~masked & ~crowded).nonzero().squeeze(1), False, False
    yield crowded.nonzero().squeeze(1), True, False
    yield (masked & ~crowded).nonzero().squeeze(1), True, True


def _equal_parts(entries: Tensor, rows: Tensor, total: int, longest: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Batches `(rows [n], entries [n, c], first)` of parts of equal length, no row twice in a batch.

    `first` says that they are the first parts of their rows.
    """
    counts = torch.bincount(rows, minlength=total)
    starts = counts.cumsum(0) - counts
    for first in range(0, int(counts.max()) if total else 0, longest):
        left = (counts - first).clamp(0, longest)
        order = torch.argsort(left, stable=True)
        lengths, sizes = torch.unique_consecutive(left[order], return_counts=True)
        batches = order.split(sizes.tolist())
        for length, batch in zip(lengths.tolist(), batches, strict=True):
            if length:
                places = starts[batch, None] + first + torch.arange(length, device=rows.device)
                yield batch, entries[places], first == 0


class Masks:
    """Bool masks of pieces; patterns are unpacked once if they are few."""

    def __init__(self, layout: BlockLayout, budget: int) -> None:
        self.layout = layout
        block_q, block_k = layout.block
        self.table: Tensor | None = None
        if (len(layout.bits) + 1) * block_q * block_k * 3 <= budget:
            whole = torch.ones(1, block_q, block_k, dtype=torch.bool, device=layout.device)
            self.table = torch.cat([unpack_bits(layout.bits, layout.block), whole])

    def of(self, piece: Piece) -> Tensor | None:
        """`[n, block_q, c * block_k]`, or None if nothing is hidden."""
        if not piece.masked:
            return None
        layout = self.layout
        block_q, block_k = layout.block
        kinds = layout.kinds[piece.entries].long()
        if self.table is not None:
            tiles = self.table[kinds.where(kinds >= 0, len(self.table) - 1)]
        else:
            tiles = unpack_bits(layout.bits[kinds.clamp(min=0).flatten()], layout.block).view(
                *kinds.shape, *layout.block
            )
            tiles |= (kinds < 0)[..., None, None]
        if layout.keys % block_k:
            places = torch.arange(block_k, device=layout.device)
            inside = layout.indices[piece.entries].long()[..., None] * block_k + places < layout.keys
            tiles = tiles & inside[:, :, None, :]
        count, length = kinds.shape
        return tiles.transpose(1, 2).reshape(count, block_q, length * block_k)
