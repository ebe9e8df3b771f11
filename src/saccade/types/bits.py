"""Packed bit masks of partial blocks: uint8 rows, row-major, least significant bit first."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bool `[P, block_q, block_k]` into uint8 `[P, ceil(block_q * block_k / 8)]`."""
    flat = mask.flatten(1)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8))
    weights = (1 << torch.arange(8, device=mask.device)).to(torch.uint8)
    return (flat.view(len(flat), flat.shape[1] // 8, 8).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


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


def unique_bits(bits: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Store equal patterns once: `(bits, kinds)` with `kinds` (>= 0 where partial) renumbered."""
    if len(bits) <= 1:
        return bits, kinds
    distinct, which = torch.unique(bits, dim=0, return_inverse=True)
    return distinct, torch.where(kinds >= 0, which[kinds.clamp(min=0).long()].int(), kinds)


def bit_counts(bits: Tensor) -> Tensor:
    """Set bits of each pattern, int64 `[P]`."""
    shifts = torch.arange(8, device=bits.device)
    table = ((torch.arange(256, device=bits.device)[:, None] >> shifts) & 1).sum(1)
    return table[bits.long()].sum(-1)
