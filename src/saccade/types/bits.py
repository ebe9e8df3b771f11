"""Packed bit masks of partial blocks: uint8 rows, row-major, least significant bit first."""

from __future__ import annotations

import torch
from torch import Tensor

GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, read as a little-endian word: their bits, in order, in its highest byte."""

MIX, SCATTER = 0x2545F4914F6CDD1D, 0x5851F42D4C957F2D
"""Odd factors with bits all over."""

IN_CACHE = 1 << 15
"""Words that are mixed at a time."""


def words(x: Tensor) -> Tensor:
    """Bytes (or bools) `[P, n]` as int64 `[P, ceil(n / 8)]`, zeros behind."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    return (x if x.storage_offset() % 8 == 0 else x.clone()).contiguous().view(torch.int64)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bool `[P, block_q, block_k]` into uint8 `[P, ceil(block_q * block_k / 8)]`."""
    return ((words(mask.flatten(1)) * GATHER >> 56) & 255).to(torch.uint8)


def unpack_bits(bits: Tensor, block: tuple[int, int]) -> Tensor:
    """The inverse of `pack_bits`: bool `[P, block_q, block_k]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = (bits[:, :, None] >> shifts) & 1
    return flat.flatten(1)[:, : block[0] * block[1]].view(len(bits), *block).bool()


def transpose_bits(bits: Tensor, block: tuple[int, int]) -> Tensor:
    """Exchange the query and key axes of every pattern."""
    return pack_bits(unpack_bits(bits, block).transpose(1, 2))


def edge_bits(height: Tensor, width: Tensor, block: tuple[int, int]) -> Tensor:
    """Bool `[P, block_q, block_k]`, True inside the first `height` rows and `width` columns of each block."""
    rows = torch.arange(block[0], device=height.device) < height[:, None]
    columns = torch.arange(block[1], device=width.device) < width[:, None]
    return rows[:, :, None] & columns[:, None, :]


def spread_rows(bits: Tensor, rows: int, width: int) -> Tensor:
    """Patterns of `rows` x `width` that keep whole rows, those whose bit is set in `bits` `[P, ceil(rows / 8)]`."""
    kept = unpack_bits(bits, (rows, 1))
    if width % 8:
        return pack_bits(kept.expand(-1, -1, width))
    return (kept.to(torch.uint8) * 255).expand(-1, -1, width // 8).flatten(1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 32 & 0xFFFFFFFF)) * MIX  # the mask makes the shift one without the sign
    return x ^ (x >> 29 & 0x7FFFFFFFF)


def unique_rows(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of uint8 `[P, n]`, and for each row which of them it is, int64 `[P]`.

    Rows are told apart by a 64-bit sum of their mixed words; should two different ones meet, they are sorted instead.
    """
    whole = words(bits)
    weights = _mix(torch.arange(1, whole.shape[1] + 1, device=bits.device) * SCATTER) | 1  # odd, and no progression
    parts = whole.split(max(1, IN_CACHE // max(whole.shape[1], 1)))
    sums = torch.cat([(_mix(part) * weights).sum(1) for part in parts])
    codes, which = torch.unique(sums, return_inverse=True)
    order = torch.arange(len(bits), device=bits.device)
    first = torch.full_like(codes, len(bits)).scatter_reduce_(0, which, order, "amin")
    distinct = bits[first]
    if torch.equal(distinct[which], bits):
        return distinct, which
    return torch.unique(bits, dim=0, return_inverse=True)


def unique_bits(bits: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Store equal patterns once: `(bits, kinds)` with `kinds` (>= 0 where partial) renumbered."""
    if len(bits) <= 1:
        return bits, kinds
    distinct, which = unique_rows(bits)
    return distinct, torch.where(kinds >= 0, which[kinds.clamp(min=0).long()].int(), kinds)


def bit_counts(bits: Tensor) -> Tensor:
    """Set bits of each pattern, int64 `[P]`."""
    x = words(bits)
    x = x - (x >> 1 & 0x5555555555555555)  # counts of 2, 4, then 8 bits, side by side
    x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101 >> 56 & 255).sum(-1)


def any_bits(bits: Tensor) -> Tensor:
    """Whether a pattern has a set bit, bool `[P]`."""
    return (words(bits) != 0).any(-1)
