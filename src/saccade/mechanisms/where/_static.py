"""What patterns that ignore the contents share: places within packed sequences, sinks, blocks fixed to positions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.types import BlockLayout, Geometry
from saccade.types.bits import pack_bits


def places(geometry: Geometry, keys: int, device: torch.device) -> Tensor:
    """Place of each key in its own sequence, int64 `[1, N]`, or `[B or 1, N]` for packed ones.

    With segments it counts from the start of the run of equal ids, so that a packed or padded sequence gets the pattern
    it would get alone.
    """
    index = torch.arange(keys, device=device)[None]
    segments = geometry.kv_segments
    if segments is None or keys == 0:
        return index
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(-1).values


def first_tokens(
    count: int, queries: int, keys: int, geometry: Geometry, block: int, device: torch.device
) -> BlockLayout:
    """Every query sees the first `count` tokens, of its own sequence where several are packed."""
    early = places(geometry, keys, device) < count
    columns = BlockLayout.tokens(
        queries, keys, key_tokens=early.any(0).nonzero()[:, 0], block=block, device=device
    )  # fmt: skip
    if geometry.kv_segments is None:
        return columns
    return BlockLayout.from_mask_mod(
        lambda b, h, i, j: early[b, j],  # noqa: ARG005
        queries,
        keys,
        batch=len(early),
        block=block,
        candidates=columns.within(geometry.replace(causal=False)),
    )


def query_block_positions(queries: int, keys: int, block: int, device: torch.device) -> Tensor:
    """Blocks of key positions that the queries lie in, int64 `[R]` ascending; the last query lies at N - 1."""
    return torch.arange((keys - queries) // block, -(-keys // block), device=device)


def from_position_blocks(chosen: Tensor, queries: int, keys: int, block: int) -> BlockLayout:
    """The layout in which block r of query *positions* reads the key blocks `chosen[:, h, r]`.

    Layouts count query blocks from query 0, which lies at position N - M. When that is inside a block of positions,
    as after a cached chunk of odd length, each query block straddles two of them and is bit-masked.

    Args:
        chosen: int64 `[1, H, R, k]` for the R blocks of `query_block_positions`; -1 is an empty slot, no repeats.
        queries: M.
        keys: N, at least M.
        block: Block size in tokens.

    Returns:
        The layout, neither cut to causality nor to segments.
    """
    offset = (keys - queries) % block
    if offset == 0 or (queries > 0 and chosen.shape[2] == 1):
        return BlockLayout.from_indices(chosen, queries, keys, block)
    rows = -(-queries // block)
    following = torch.cat([chosen[:, :, 1:], torch.full_like(chosen[:, :, :1], -1)], 2)
    above = torch.arange(block, device=chosen.device) < block - offset

    def part(lists: Tensor, inside: Tensor) -> BlockLayout:
        full = BlockLayout.from_indices(lists[:, :, :rows], queries, keys, block)
        return replace(full, kinds=full.kinds + 1, bits=pack_bits(inside[None, :, None].expand(1, block, block)))

    return part(chosen, above) | part(following, ~above)
