"""Building block layouts: one function for each builder of `BlockLayout`, and the cuts of `within`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.types.bits import pack_bits, unique_bits, unpack_bits
from saccade.types.layout_algebra import CHUNK_BITS, block_pair, combine, empty_bits, expand, make, ranges, take

if TYPE_CHECKING:
    from saccade.types.layout import BlockLayout


def window(
    queries: int, keys: int, left: int, right: int, block: int | tuple[int, int], device: torch.device | str
) -> BlockLayout:
    """See `BlockLayout.window`."""
    if left < -1 or right < -1:
        raise ValueError(f"window=({left}, {right}): expected sizes of at least 0, or -1 for unbounded")
    if queries < 0 or keys < 0:
        raise ValueError(f"queries={queries}, keys={keys}: expected counts of at least 0")
    block_q, block_k = block_pair(block)
    first = torch.arange(0, queries, block_q, device=device)
    last = (first + block_q).clamp(max=queries) - 1
    low = torch.zeros_like(first) if left < 0 else (first + keys - queries - left).clamp(min=0)
    high = torch.full_like(last, keys - 1) if right < 0 else (last + keys - queries + right).clamp(max=keys - 1)
    low, high = low // block_k, high.div(block_k, rounding_mode="floor")
    counts = (high - low + 1).clamp(min=0)
    row = torch.arange(len(first), device=device).repeat_interleave(counts)
    column = ranges(low, counts)
    sizes = {"batch": 1, "heads": 1, "queries": queries, "keys": keys, "block": (block_q, block_k)}
    layout = make(row, column, torch.full_like(row, -1), empty_bits((block_q, block_k), row.device), sizes)
    return clip_band(layout, left, right)


def clip_band(layout: BlockLayout, left: int, right: int) -> BlockLayout:
    """Keep the pairs with -right <= (i + N - M) - j <= left; -1 = unbounded."""
    block_q, block_k = layout.block
    row, column, kinds = layout.rows, layout.indices.long(), layout.kinds.long()
    corner = (row % layout.query_blocks) * block_q + layout.keys - layout.queries - column * block_k
    nearest, farthest = corner - (block_k - 1), corner + block_q - 1
    alive = torch.ones_like(corner, dtype=torch.bool)
    cut = torch.zeros_like(alive)
    if left >= 0:
        alive &= nearest <= left
        cut |= farthest > left
    if right >= 0:
        alive &= farthest >= -right
        cut |= nearest < -right
    row, column, kinds, corner, cut = (x[alive] for x in (row, column, kinds, corner, cut))

    # A block's band pattern depends only on its corner's distance from the diagonal, so few distinct ones exist.
    distinct, which = torch.unique(torch.stack([corner[cut], kinds[cut]], 1), dim=0, return_inverse=True)
    rows = torch.arange(block_q, device=row.device)[:, None]
    columns = torch.arange(block_k, device=row.device)
    new_bits = [layout.bits]
    for chunk in distinct.split(max(1, CHUNK_BITS // (block_q * block_k))):
        distance = chunk[:, 0, None, None] + rows - columns
        mask = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            mask &= distance <= left
        if right >= 0:
            mask &= distance >= -right
        partial = chunk[:, 1] >= 0
        mask[partial] &= unpack_bits(layout.bits[chunk[partial, 1]], layout.block)
        new_bits.append(pack_bits(mask))
    kinds[cut] = which + len(layout.bits)
    return make(row, column, kinds, torch.cat(new_bits), layout)


def clip_segments(layout: BlockLayout, q_segments: Tensor, kv_segments: Tensor) -> BlockLayout:
    """Keep the pairs of equal, non-negative segments; `[B or 1, M]` and `[B or 1, N]`."""
    batch = max(layout.batch, len(q_segments), len(kv_segments))
    layout = expand(layout, batch, layout.heads)
    q_low, q_high = block_extremes(q_segments.expand(batch, -1), layout.block[0])
    k_low, k_high = block_extremes(kv_segments.expand(batch, -1), layout.block[1])
    row, column = layout.rows, layout.indices.long()
    item, query_block = row // (layout.heads * layout.query_blocks), row % layout.query_blocks
    q_min, q_max = q_low[item, query_block], q_high[item, query_block]
    k_min, k_max = k_low[item, column], k_high[item, column]
    apart = (q_max < k_min) | (k_max < q_min) | (q_max < 0) | (k_max < 0)
    same = (q_min == q_max) & (k_min == k_max) & (q_min == k_min) & (q_min >= 0)

    def same_segment(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # noqa: ARG001
        seen, looked_at = q_segments[b % len(q_segments), q], kv_segments[b % len(kv_segments), k]
        return (seen == looked_at) & (seen >= 0)

    unsure = take(layout, ~apart & ~same)
    mixed = from_mask_mod(
        same_segment, layout.queries, layout.keys, batch, layout.heads, layout.block, unsure, layout.device
    )
    return combine(take(layout, same), mixed, union=True)


def block_extremes(segments: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest segment of each block of `size` tokens, `[B, blocks]` each."""
    pad = -segments.shape[1] % size
    tail = segments[:, -1:].expand(-1, pad)
    blocks = torch.cat([segments, tail], 1).view(len(segments), -1, size)
    return blocks.amin(-1), blocks.amax(-1)


def every_row(layout_sizes: dict[str, Any], columns: Tensor, kinds: Tensor, bits: Tensor) -> BlockLayout:
    """The same key blocks `columns` with `kinds` in every row."""
    rows = layout_sizes["batch"] * layout_sizes["heads"] * -(-layout_sizes["queries"] // layout_sizes["block"][0])
    row = torch.arange(rows, device=columns.device).repeat_interleave(len(columns))
    return make(row, columns.repeat(rows), kinds.repeat(rows), bits, layout_sizes)


def tokens(
    queries: int,
    keys: int,
    key_tokens: Tensor | None,
    query_tokens: Tensor | None,
    block: int | tuple[int, int],
    device: torch.device | str,
) -> BlockLayout:
    """See `BlockLayout.tokens`."""
    pair = block_pair(block)
    sizes = {"batch": 1, "heads": 1, "queries": queries, "keys": keys, "block": pair}
    seen = _token_columns(key_tokens, keys, pair, device, "key_tokens")
    layout = every_row(sizes, *seen)
    if query_tokens is None:
        return layout
    flipped = {**sizes, "queries": keys, "keys": queries, "block": (pair[1], pair[0])}
    columns, kinds, bits = _token_columns(query_tokens, queries, (pair[1], pair[0]), device, "query_tokens")
    return combine(layout, every_row(flipped, columns, kinds, bits).transpose(), union=True)


def _token_columns(
    positions: Tensor | None, length: int, block: tuple[int, int], device: torch.device | str, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Key blocks that hold `positions`, and for each its pattern."""
    marked = torch.zeros(-(-length // block[1]) * block[1], dtype=torch.bool, device=device)
    if positions is not None and len(positions):
        if int(positions.min()) < 0 or int(positions.max()) >= length:
            raise ValueError(f"{name} in [{int(positions.min())}, {int(positions.max())}]: expected [0, {length})")
        marked[positions.to(device)] = True
    blocks = marked.view(-1, block[1])
    columns = blocks.any(1).nonzero()[:, 0]
    bits = pack_bits(blocks[columns][:, None, :].expand(-1, block[0], -1))
    kinds = torch.arange(len(columns), device=marked.device)
    return columns, torch.where(blocks[columns].all(1), -1, kinds), bits


def stride(
    queries: int, keys: int, step: int, offset: int, block: int | tuple[int, int], device: torch.device | str
) -> BlockLayout:
    """See `BlockLayout.stride`."""
    if step < 1 or not 0 <= offset < step:
        raise ValueError(f"step={step}, offset={offset}: expected step >= 1 and 0 <= offset < step")
    return tokens(queries, keys, torch.arange(min(offset, keys), keys, step, device=device), None, block, device)


def from_dense(mask: Tensor, block: int | tuple[int, int]) -> BlockLayout:
    """See `BlockLayout.from_dense`."""
    if mask.dtype != torch.bool or mask.ndim not in (2, 4):
        raise ValueError(f"mask of dtype {mask.dtype}, shape {tuple(mask.shape)}: expected bool [M, N] or [B, H, M, N]")
    mask = mask.view(1, 1, *mask.shape) if mask.ndim == 2 else mask
    batch, heads, queries, keys = mask.shape
    return from_mask_mod(lambda b, h, q, k: mask[b, h, q, k], queries, keys, batch, heads, block, None, mask.device)


def from_indices(
    indices: Tensor, queries: int, keys: int, block: int | tuple[int, int], valid: Tensor | None
) -> BlockLayout:
    """See `BlockLayout.from_indices`."""
    pair = block_pair(block)
    expected = -(-queries // pair[0])
    if indices.ndim != 4 or indices.shape[2] != expected:
        raise ValueError(f"indices of shape {tuple(indices.shape)}: expected [B or 1, H or 1, {expected}, k]")
    chosen = indices >= 0 if valid is None else valid & (indices >= 0)
    key_blocks = -(-keys // pair[1])
    if indices.numel() and int(indices.max()) >= key_blocks:
        raise ValueError(f"indices up to {int(indices.max())}: expected key blocks in [0, {key_blocks})")
    ordered = torch.where(chosen, indices.long(), key_blocks).sort(-1).values.flatten(0, 2)
    row, slot = (ordered < key_blocks).nonzero(as_tuple=True)
    sizes = {
        "batch": indices.shape[0], "heads": indices.shape[1], "queries": queries, "keys": keys, "block": pair,
    }  # fmt: skip
    return make(row, ordered[row, slot], torch.full_like(row, -1), empty_bits(pair, indices.device), sizes)


def from_block_mask(mask: Any, block: tuple[int, int], queries: int | None, keys: int | None) -> BlockLayout:
    """See `BlockLayout.from_block_mask`."""
    if not isinstance(mask, Tensor):
        return from_flex_block_mask(mask)
    if mask.dtype != torch.bool or not 2 <= mask.ndim <= 4:
        raise ValueError(f"mask of dtype {mask.dtype}, shape {tuple(mask.shape)}: expected bool [B, H, Q, K]")
    mask = mask.view(*(1,) * (4 - mask.ndim), *mask.shape)
    queries = mask.shape[2] * block[0] if queries is None else queries
    keys = mask.shape[3] * block[1] if keys is None else keys
    if mask.shape[2:] != (-(-queries // block[0]), -(-keys // block[1])):
        raise ValueError(
            f"mask of {tuple(mask.shape[2:])} blocks: expected {(-(-queries // block[0]), -(-keys // block[1]))} "
            f"for queries={queries}, keys={keys}, block={block}"
        )
    row, column = mask.flatten(0, 2).nonzero(as_tuple=True)
    sizes = {"batch": mask.shape[0], "heads": mask.shape[1], "queries": queries, "keys": keys, "block": block}
    return make(row, column, torch.full_like(row, -1), empty_bits(block, mask.device), sizes)


def from_flex_block_mask(mask: Any) -> BlockLayout:
    """From a FlexAttention `BlockMask`; its `mask_mod` is evaluated on the partial blocks only."""
    needed = ("kv_num_blocks", "kv_indices", "mask_mod", "BLOCK_SIZE", "seq_lengths")
    if not all(hasattr(mask, name) for name in needed):
        raise ValueError(f"mask of type {type(mask).__name__}: expected a bool tensor or a FlexAttention BlockMask")
    queries, keys = mask.seq_lengths
    block = block_pair(mask.BLOCK_SIZE)

    def listed(counts: Tensor, indices: Tensor) -> BlockLayout:
        rows = -(-queries // block[0])
        slots = torch.arange(indices.shape[-1], device=indices.device)
        return from_indices(indices[:, :, :rows], queries, keys, block, slots < counts[:, :, :rows, None])

    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    layout = from_mask_mod(mask.mask_mod, queries, keys, partial.batch, partial.heads, block, partial, partial.device)
    if mask.full_kv_num_blocks is None:
        return layout
    return combine(layout, listed(mask.full_kv_num_blocks, mask.full_kv_indices), union=True)


def from_mask_mod(
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    queries: int,
    keys: int,
    batch: int,
    heads: int,
    block: int | tuple[int, int],
    candidates: BlockLayout | None,
    device: torch.device | str,
) -> BlockLayout:
    """See `BlockLayout.from_mask_mod`."""
    pair = block_pair(block)
    sizes = {"batch": batch, "heads": heads, "queries": queries, "keys": keys, "block": pair}
    if candidates is None:
        key_blocks = -(-keys // pair[1])
        rows = batch * heads * -(-queries // pair[0])
        total = rows * key_blocks
    else:
        candidates = expand(candidates, batch, heads)
        total = len(candidates.indices)
        device = candidates.device
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    patterns: list[Tensor] = []
    stored = 0
    step = max(1, CHUNK_BITS // (pair[0] * pair[1]))
    for start in range(0, total, step):
        entry = torch.arange(start, min(start + step, total), device=device)
        if candidates is None:
            row, column, allowed = entry // key_blocks, entry % key_blocks, None
        else:
            row, column = torch.searchsorted(candidates.indptr, entry, right=True) - 1, candidates.indices[entry].long()
            allowed = candidates.entry_mask(entry)
        mask, inside = _evaluate(mask_mod, row, column, sizes)
        mask = mask & (inside if allowed is None else allowed)
        full = (mask | ~inside).flatten(1).all(1)
        alive = mask.flatten(1).any(1)
        partial = alive & ~full
        kinds = torch.full_like(row, -1)
        bits = pack_bits(mask[partial])
        kinds[partial] = torch.arange(len(bits), device=row.device)
        bits, kinds = unique_bits(bits, kinds.int())
        found.append((row[alive], column[alive], torch.where(kinds >= 0, kinds + stored, kinds)[alive]))
        patterns.append(bits)
        stored += len(bits)
    if not found:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return make(none, none, none, empty_bits(pair, none.device), sizes)
    row, column, kinds = (torch.cat(parts) for parts in zip(*found, strict=True))
    return make(row, column, kinds, torch.cat(patterns), sizes)


def _evaluate(
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], row: Tensor, column: Tensor, sizes: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """`mask_mod` on whole blocks, and which positions of each block exist; bool `[n, block_q, block_k]` both."""
    block_q, block_k = sizes["block"]
    query_blocks = -(-sizes["queries"] // block_q)
    group = row // query_blocks
    q = (row % query_blocks * block_q)[:, None, None] + torch.arange(block_q, device=row.device)[:, None]
    k = (column * block_k)[:, None, None] + torch.arange(block_k, device=row.device)
    inside = (q < sizes["queries"]) & (k < sizes["keys"])
    mask = mask_mod(
        (group // sizes["heads"])[:, None, None],
        (group % sizes["heads"])[:, None, None],
        q.clamp(max=sizes["queries"] - 1),
        k.clamp(max=sizes["keys"] - 1),
    )
    return mask.expand(inside.shape), inside
