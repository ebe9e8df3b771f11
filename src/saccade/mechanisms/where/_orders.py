"""Orders of a grid's cells in which runs of consecutive cells are compact."""

from __future__ import annotations

import torch
from torch import Tensor


def hilbert_order(grid: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Row-major indices of a grid's cells in the order a Hilbert curve visits them (Skilling's transform), int64.

    Sizes that are not equal powers of two are visited in the order of the smallest enclosing cube.
    """
    bits = max(1, (max(grid) - 1).bit_length())
    axes = [axis.flatten() for axis in torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")]
    for low in (2**bit - 1 for bit in range(bits - 1, 0, -1)):  # undo the rotations of the coarser levels
        for i in range(len(axes)):
            inverted = axes[i] & (low + 1) != 0
            exchanged = torch.where(inverted, 0, (axes[0] ^ axes[i]) & low)
            axes[i] = axes[i] ^ exchanged
            axes[0] = axes[0] ^ torch.where(inverted, low, exchanged)
    for i in range(1, len(axes)):  # Gray code
        axes[i] = axes[i] ^ axes[i - 1]
    parity = torch.zeros_like(axes[0])
    for low in (2**bit - 1 for bit in range(bits - 1, 0, -1)):
        parity = torch.where(axes[-1] & (low + 1) != 0, parity ^ low, parity)
    place = torch.zeros_like(parity)
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            place = place << 1 | ((axis ^ parity) >> bit & 1)
    return place.argsort()


def z_order(grid: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Row-major indices of a grid's cells in Z order, int64: the bits of the coordinates interleaved, first axis first.

    Every aligned run of 2^(axes * l) cells is a cube of side 2^l, where sizes allow it.
    """
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    place = torch.zeros_like(axes[0].flatten())
    for bit in range((max(grid, default=1) - 1).bit_length() - 1, -1, -1):
        for axis in axes:
            place = place << 1 | (axis.flatten() >> bit & 1)
    return place.argsort()
