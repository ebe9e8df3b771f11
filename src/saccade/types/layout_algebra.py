"""What block layouts are made of and how they combine. Everything works on entries; nothing here is M x N."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.types.bits import any_bits, bit_counts, edge_bits, transpose_bits, unique_bits, unpack_bits

if TYPE_CHECKING:
    from saccade.types.layout import BlockLayout

CHUNK_BITS = 1 << 24
"""Mask elements that are unpacked at a time."""

ABSENT = -2


def block_pair(block: int | tuple[int, int]) -> tuple[int, int]:
    """`block` as `(block_q, block_k)`, checked."""
    pair = (block, block) if isinstance(block, int) else tuple(block)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"block={block}: expected a size of at least 1, or (block_q, block_k)")
    return pair[0], pair[1]


def causal_pairs(queries: int, keys: int) -> int:
    """Number of (query, key) pairs with j <= i + N - M."""
    skipped = max(queries - keys, 0)
    seeing = queries - skipped
    first = skipped + keys - queries + 1
    return seeing * (2 * first + seeing - 1) // 2


def indptr_from_counts(counts: Tensor) -> Tensor:
    """CSR row pointers, int64 `[rows + 1]`."""
    return torch.nn.functional.pad(counts.long().cumsum(0), (1, 0))


def ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """Concatenate `arange(start, start + count)` over the rows."""
    total = int(counts.sum())
    ends = counts.cumsum(0)
    base = (starts - ends + counts).repeat_interleave(counts, output_size=total)
    return base + torch.arange(total, device=starts.device)


def make(row: Tensor, column: Tensor, kinds: Tensor, bits: Tensor, like: BlockLayout | dict[str, Any]) -> BlockLayout:
    """A layout from entries sorted by (row, column); patterns stored once, empty and unused ones dropped."""
    from saccade.types.layout import BlockLayout

    sizes = like if isinstance(like, dict) else sizes_of(like)
    if len(bits):
        kept = (kinds < 0) | any_bits(bits)[kinds.clamp(min=0).long()]
        row, column, kinds = row[kept], column[kept], kinds[kept]
        used, which = torch.unique(kinds.clamp(min=0), return_inverse=True)
        bits, kinds = bits[used.long()], torch.where(kinds >= 0, which.int(), kinds)
        if not bool((kinds >= 0).any()):
            bits = bits[:0]
        bits, kinds = unique_bits(bits, kinds)
    rows = sizes["batch"] * sizes["heads"] * -(-sizes["queries"] // sizes["block"][0])
    return BlockLayout(
        indptr=indptr_from_counts(torch.bincount(row, minlength=rows)),
        indices=column.int(),
        kinds=kinds.int(),
        bits=bits,
        **sizes,
    )


def sizes_of(layout: BlockLayout) -> dict[str, Any]:
    """The non-tensor fields."""
    return {name: getattr(layout, name) for name in ("batch", "heads", "queries", "keys", "block")}


def empty_bits(block: tuple[int, int], device: torch.device) -> Tensor:
    """No patterns."""
    return torch.empty(0, -(-block[0] * block[1] // 8), dtype=torch.uint8, device=device)


def take(layout: BlockLayout, chosen: Tensor) -> BlockLayout:
    """Only the entries where bool `chosen` `[entries]` is True."""
    return make(layout.rows[chosen], layout.indices[chosen], layout.kinds[chosen], layout.bits, layout)


def expand(layout: BlockLayout, batch: int, heads: int) -> BlockLayout:
    """See `BlockLayout.expand`."""
    if (layout.batch, layout.heads) == (batch, heads):
        return layout
    if layout.batch not in (1, batch) or layout.heads not in (1, heads):
        raise ValueError(f"batch={batch}, heads={heads}: cannot expand a layout of {layout.batch} x {layout.heads}")
    groups = layout.batch * layout.heads
    rows = torch.arange(groups * layout.query_blocks, device=layout.device)
    rows = rows.view(layout.batch, layout.heads, -1).expand(batch, heads, -1).flatten()
    return _take_rows(layout, rows, batch=batch, heads=heads)


def take_query_blocks(layout: BlockLayout, blocks: Tensor) -> BlockLayout:
    """The pattern of some query blocks alone, as if no other queries were there: those of the blocks, in that order.

    Args:
        layout: The pattern of all queries.
        blocks: int64 `[n]`, ascending, so that a last block that is not full stays last.

    Returns:
        The layout of the queries of these blocks and all keys.
    """
    rows = torch.arange(layout.batch * layout.heads, device=layout.device)[:, None] * layout.query_blocks + blocks
    last = layout.query_blocks - 1
    missing = layout.query_blocks * layout.block[0] - layout.queries if last in blocks else 0
    return _take_rows(layout, rows.flatten(), queries=len(blocks) * layout.block[0] - missing)


def _take_rows(layout: BlockLayout, rows: Tensor, **sizes: int) -> BlockLayout:
    """A layout of these rows of another, with these new sizes."""
    counts = layout.indptr.diff()[rows]
    entries = ranges(layout.indptr[rows], counts)
    return replace(
        layout,
        indptr=indptr_from_counts(counts),
        indices=layout.indices[entries],
        kinds=layout.kinds[entries],
        **sizes,  # type: ignore[arg-type]
    )


def combine(a: BlockLayout, b: BlockLayout, *, union: bool) -> BlockLayout:
    """Union or intersection of two layouts of the same sizes and block."""
    for name in ("queries", "keys", "block"):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(f"{name}={getattr(b, name)}: expected {getattr(a, name)}, that of the other layout")
    batch, heads = max(a.batch, b.batch), max(a.heads, b.heads)
    a, b = expand(a, batch, heads), expand(b, batch, heads)
    code_a, code_b = (x.rows * x.key_blocks + x.indices for x in (a, b))
    codes = torch.unique(torch.cat([code_a, code_b]))
    kind_a = torch.full_like(codes, ABSENT)
    kind_b = kind_a.clone()
    kind_a[torch.searchsorted(codes, code_a)] = a.kinds.long()
    kind_b[torch.searchsorted(codes, code_b)] = torch.where(b.kinds >= 0, b.kinds.long() + len(a.bits), b.kinds.long())
    if not union:
        both = (kind_a != ABSENT) & (kind_b != ABSENT)
        codes, kind_a, kind_b = codes[both], kind_a[both], kind_b[both]
    bits = torch.cat([a.bits, b.bits])
    kinds = torch.minimum(kind_a, kind_b) if union else torch.maximum(kind_a, kind_b)
    if union:
        kinds = torch.where(kind_a == ABSENT, kind_b, torch.where(kind_b == ABSENT, kind_a, kinds))
    mixed = (kind_a >= 0) & (kind_b >= 0)
    if bool(mixed.any()):
        pairs, which = torch.unique(torch.stack([kind_a[mixed], kind_b[mixed]], 1), dim=0, return_inverse=True)
        kinds[mixed] = which + len(bits)
        first, second = bits[pairs[:, 0]], bits[pairs[:, 1]]
        bits = torch.cat([bits, first | second if union else first & second])
    full = bit_counts(bits) == a.block[0] * a.block[1]
    kinds = torch.where((kinds >= 0) & full[kinds.clamp(min=0)], -1, kinds) if len(bits) else kinds
    return make(codes // a.key_blocks, codes % a.key_blocks, kinds, bits, a)


def transpose(layout: BlockLayout) -> BlockLayout:
    """See `BlockLayout.transpose`."""
    from saccade.types.layout import BlockLayout

    row, column = layout.rows, layout.indices.long()
    group, query_block = row // layout.query_blocks, row % layout.query_blocks
    new_row = group * layout.key_blocks + column
    order = torch.argsort(new_row * layout.query_blocks + query_block)
    counts = torch.bincount(new_row, minlength=layout.batch * layout.heads * layout.key_blocks)
    return BlockLayout(
        indptr=indptr_from_counts(counts),
        indices=query_block[order].int(),
        kinds=layout.kinds[order],
        bits=transpose_bits(layout.bits, layout.block),
        batch=layout.batch,
        heads=layout.heads,
        queries=layout.keys,
        keys=layout.queries,
        block=(layout.block[1], layout.block[0]),
    )


def count_pairs(layout: BlockLayout) -> Tensor:
    """See `BlockLayout.pairs`."""
    block_q, block_k = layout.block
    row, column = layout.rows, layout.indices.long()
    height = (layout.queries - (row % layout.query_blocks) * block_q).clamp(max=block_q)
    width = (layout.keys - column * block_k).clamp(max=block_k)
    kept = height * width
    partial = layout.kinds >= 0
    if bool(partial.any()):
        kept[partial] = _partial_pairs(layout, partial, height, width)
    per_group = torch.zeros(layout.batch * layout.heads, dtype=torch.int64, device=layout.device)
    per_group.scatter_add_(0, row // layout.query_blocks, kept)
    return per_group.view(layout.batch, layout.heads)


def _partial_pairs(layout: BlockLayout, partial: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Pairs kept by each bit-masked entry; patterns cut by the ragged edge are counted once per distinct cut."""
    cuts = torch.stack([layout.kinds[partial].long(), height[partial], width[partial]], 1)
    distinct, which = torch.unique(cuts, dim=0, return_inverse=True)
    counts = []
    for chunk in distinct.split(max(1, CHUNK_BITS // (layout.block[0] * layout.block[1]))):
        bits = unpack_bits(layout.bits[chunk[:, 0]], layout.block) & edge_bits(chunk[:, 1], chunk[:, 2], layout.block)
        counts.append(bits.flatten(1).sum(1))
    return torch.cat(counts)[which]


def validate(layout: BlockLayout) -> None:
    """See `BlockLayout.validate`."""
    rows = layout.batch * layout.heads * layout.query_blocks
    entries = len(layout.indices)
    expected = {
        "indptr": (torch.int64, (rows + 1,)),
        "indices": (torch.int32, (entries,)),
        "kinds": (torch.int32, (entries,)),
        "bits": (torch.uint8, (len(layout.bits), -(-layout.block[0] * layout.block[1] // 8))),
    }
    for name, (dtype, shape) in expected.items():
        tensor = getattr(layout, name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device != layout.device:
            raise ValueError(
                f"{name} of dtype {tensor.dtype}, shape {tuple(tensor.shape)} on {tensor.device}: "
                f"expected {dtype}, {shape} on {layout.device}"
            )
    if int(layout.indptr[0]) != 0 or int(layout.indptr[-1]) != entries or bool((layout.indptr.diff() < 0).any()):
        raise ValueError(f"indptr: expected to rise from 0 to {entries}, got {layout.indptr.tolist()[:8]}...")
    if entries and (int(layout.indices.min()) < 0 or int(layout.indices.max()) >= layout.key_blocks):
        raise ValueError(f"indices: expected key blocks in [0, {layout.key_blocks}), got up to {layout.indices.max()}")
    if entries and (int(layout.kinds.min()) < -1 or int(layout.kinds.max()) >= len(layout.bits)):
        raise ValueError(f"kinds: expected -1 or a pattern in [0, {len(layout.bits)}), got up to {layout.kinds.max()}")
    code = layout.rows * layout.key_blocks + layout.indices
    if bool((code.diff() <= 0).any()):
        raise ValueError("indices: expected strictly ascending key blocks within each row")
