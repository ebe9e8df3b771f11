"""BlockLayout: which blocks of the attention matrix are computed, in compressed rows. The language of *where*."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.types import layout_algebra as algebra
from saccade.types import layout_build as build
from saccade.types.bits import edge_bits, unpack_bits

if TYPE_CHECKING:
    from saccade.types.base import Geometry

FULL = -1
"""Value of `kinds` for a block whose every (query, key) pair is kept."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's form: `(batch, head, query, key)` index tensors that broadcast -> bool, True = attend."""


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """A block-sparse attention pattern: for each query block, the key blocks it reads, each full or bit-masked.

    Row `r = (b * heads + h) * query_blocks + i` owns entries `indptr[r]:indptr[r + 1]`. Pairs past M or N (the ragged
    edge of the last blocks) are never attended, whatever a block says.

    Args:
        indptr: int64 `[batch * heads * query_blocks + 1]`, on the device of all other tensors.
        indices: int32 `[entries]`, key block of each entry, ascending within a row.
        kinds: int32 `[entries]`, -1 for a full block, else the row of `bits` that masks it.
        bits: uint8 `[patterns, ceil(block_q * block_k / 8)]`, row-major, least significant bit first, 1 = attend.
        batch: B, or 1 to share the pattern over the batch.
        heads: H, or 1 to share the pattern over the heads.
        queries: M.
        keys: N.
        block: `(block_q, block_k)` in tokens.
    """

    indptr: Tensor
    indices: Tensor
    kinds: Tensor
    bits: Tensor
    batch: int
    heads: int
    queries: int
    keys: int
    block: tuple[int, int]

    # -- shape ------------------------------------------------------------------------------------------------------

    @property
    def query_blocks(self) -> int:
        """Number of query blocks, ceil(M / block_q)."""
        return -(-self.queries // self.block[0])

    @property
    def key_blocks(self) -> int:
        """Number of key blocks, ceil(N / block_k)."""
        return -(-self.keys // self.block[1])

    @property
    def device(self) -> torch.device:
        """Where the layout's tensors live."""
        return self.indptr.device

    @property
    def counts(self) -> Tensor:
        """Key blocks per query block, int64 `[batch, heads, query_blocks]`."""
        return self.indptr.diff().view(self.batch, self.heads, self.query_blocks)

    @property
    def rows(self) -> Tensor:
        """Row of every entry, int64 `[entries]`."""
        row_ids = torch.arange(len(self.indptr) - 1, device=self.device)
        return row_ids.repeat_interleave(self.indptr.diff(), output_size=len(self.indices))

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on `device`."""
        if torch.device(device) == self.device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("indptr", "indices", "kinds", "bits")}
        return replace(self, **moved)

    # -- builders ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_dense(cls, mask: Tensor, block: int | tuple[int, int] = 64) -> BlockLayout:
        """From a bool mask `[M, N]` or `[B or 1, H or 1, M, N]` (True = attend); exact, with bit-masked blocks."""
        return build.from_dense(mask, block)

    @classmethod
    def from_block_mask(
        cls,
        mask: Any,
        block_q: int = 64,
        block_k: int = 64,
        queries: int | None = None,
        keys: int | None = None,
    ) -> BlockLayout:
        """From a bool block mask `[(B or 1,) (H or 1,) Q, K]` of full blocks, or from a FlexAttention `BlockMask`.

        `queries` and `keys` default to Q * block_q and K * block_k; a `BlockMask` brings its own sizes and blocks, and
        its `mask_mod` is evaluated on its partial blocks only.
        """
        return build.from_block_mask(mask, (block_q, block_k), queries, keys)

    @classmethod
    def from_indices(
        cls, indices: Tensor, queries: int, keys: int, block: int | tuple[int, int] = 64, valid: Tensor | None = None
    ) -> BlockLayout:
        """From chosen key blocks int `[B or 1, H or 1, Q, k]` (any order, no repeats), where `valid` is True (or all).

        Negative indices count as not chosen. All blocks are full; see `within` for causality and segments.
        """
        return build.from_indices(indices, queries, keys, block, valid)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: MaskMod,
        queries: int,
        keys: int,
        *,
        batch: int = 1,
        heads: int = 1,
        block: int | tuple[int, int] = 64,
        candidates: BlockLayout | None = None,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """From a FlexAttention `mask_mod`, evaluated in bounded chunks, on the blocks of `candidates` only if given."""
        return build.from_mask_mod(mask_mod, queries, keys, batch, heads, block, candidates, device)

    @classmethod
    def window(
        cls,
        queries: int,
        keys: int,
        left: int = -1,
        right: int = -1,
        *,
        block: int | tuple[int, int] = 64,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """Query i sees keys i + N - M - left .. i + N - M + right; -1 = unbounded, so `right=0` alone is causal."""
        return build.window(queries, keys, left, right, block, device)

    @classmethod
    def tokens(
        cls,
        queries: int,
        keys: int,
        *,
        key_tokens: Tensor | None = None,
        query_tokens: Tensor | None = None,
        block: int | tuple[int, int] = 64,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """Global tokens: every query sees the keys in `key_tokens`; the queries in `query_tokens` see every key."""
        return build.tokens(queries, keys, key_tokens, query_tokens, block, device)

    @classmethod
    def stride(
        cls,
        queries: int,
        keys: int,
        step: int,
        *,
        offset: int = 0,
        block: int | tuple[int, int] = 64,
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """Every query sees the keys j with j % step == offset."""
        return build.stride(queries, keys, step, offset, block, device)

    @classmethod
    def dense(
        cls, queries: int, keys: int, *, block: int | tuple[int, int] = 64, device: torch.device | str = "cpu"
    ) -> BlockLayout:
        """Every pair."""
        return build.window(queries, keys, -1, -1, block, device)

    # -- algebra ----------------------------------------------------------------------------------------------------

    def union(self, *others: BlockLayout) -> BlockLayout:
        """Pairs in any of the layouts (same sizes and block; batch and heads broadcast)."""
        result = self
        for other in others:
            result = algebra.combine(result, other, union=True)
        return result

    def intersection(self, *others: BlockLayout) -> BlockLayout:
        """Pairs in all of the layouts (same sizes and block; batch and heads broadcast)."""
        result = self
        for other in others:
            result = algebra.combine(result, other, union=False)
        return result

    __or__ = union
    __and__ = intersection

    def within(self, geometry: Geometry) -> BlockLayout:
        """Only the pairs that causality and segments of `geometry` allow; blocks left empty are dropped."""
        result = self
        if geometry.causal:
            result = build.clip_band(result, -1, 0)
        if geometry.q_segments is not None and geometry.kv_segments is not None:
            result = build.clip_segments(result, geometry.q_segments, geometry.kv_segments)
        return result

    def transpose(self) -> BlockLayout:
        """The layout with queries and keys exchanged: for each key block, the query blocks that read it."""
        return algebra.transpose(self)

    def expand(self, batch: int, heads: int) -> BlockLayout:
        """The same pattern repeated to `batch` and `heads`."""
        return algebra.expand(self, batch, heads)

    # -- reading ----------------------------------------------------------------------------------------------------

    def pairs(self) -> Tensor:
        """Kept (query, key) pairs per batch and head, int64 `[batch, heads]`."""
        return algebra.count_pairs(self)

    def density(self, *, causal: bool = False) -> float:
        """Kept pairs over all M x N pairs, or over the bottom-right causal pairs if `causal`."""
        return float(self.density_per_head(causal=causal).mean())

    def density_per_head(self, *, causal: bool = False) -> Tensor:
        """`density` for each batch and head, fp64 `[batch, heads]`."""
        total = algebra.causal_pairs(self.queries, self.keys) if causal else self.queries * self.keys
        return self.pairs().double() / max(total, 1)

    def validate(self) -> None:
        """Check every invariant of the format.

        Raises:
            ValueError: Naming the field, the value found and what is expected.
        """
        algebra.validate(self)

    def entry_mask(self, entries: Tensor) -> Tensor:
        """Bool `[len(entries), block_q, block_k]` of the given entries, ragged edges cut off."""
        block_q, block_k = self.block
        row = torch.searchsorted(self.indptr, entries, right=True) - 1
        height = (self.queries - (row % self.query_blocks) * block_q).clamp(max=block_q)
        width = (self.keys - self.indices[entries].long() * block_k).clamp(max=block_k)
        mask = edge_bits(height, width, self.block)
        kinds = self.kinds[entries]
        partial = kinds >= 0
        mask[partial] &= unpack_bits(self.bits[kinds[partial].long()], self.block)
        return mask

    def to_dense(self) -> Tensor:
        """The bool mask `[batch, heads, M, N]`. For small sizes: it is M x N."""
        block_q, block_k = self.block
        groups, rows, columns = self.batch * self.heads, self.query_blocks, self.key_blocks
        tiles = torch.zeros(groups * rows, columns, block_q, block_k, dtype=torch.bool, device=self.device)
        tiles[self.rows, self.indices.long()] = self.entry_mask(torch.arange(len(self.indices), device=self.device))
        full = tiles.view(groups, rows, columns, block_q, block_k).transpose(2, 3)
        full = full.reshape(self.batch, self.heads, rows * block_q, columns * block_k)
        return full[..., : self.queries, : self.keys]

    def block_mask(self) -> Tensor:
        """Bool `[batch, heads, query_blocks, key_blocks]`: which blocks have an entry."""
        mask = torch.zeros(
            self.batch * self.heads * self.query_blocks, self.key_blocks, dtype=torch.bool, device=self.device
        )
        mask[self.rows, self.indices.long()] = True
        return mask.view(self.batch, self.heads, self.query_blocks, self.key_blocks)

    def plot(self, batch: int = 0, head: int = 0, *, path: str | None = None, size: int = 256) -> Any:
        """Draw one head's pattern, darker = denser; needs matplotlib.

        Args:
            batch: Number of the sequence.
            head: Number of the head.
            path: File to write; None writes none.
            size: Most cells a side.

        Returns:
            The matplotlib figure, also written to `path` if given.
        """
        from saccade.types.layout_plot import plot_layout

        return plot_layout(self, batch, head, path, size)

    def __repr__(self) -> str:
        """Sizes, block and counts; not the contents."""
        return (
            f"BlockLayout(batch={self.batch}, heads={self.heads}, queries={self.queries}, keys={self.keys}, "
            f"block={self.block}, entries={len(self.indices)}, patterns={len(self.bits)})"
        )
