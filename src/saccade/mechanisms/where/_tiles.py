"""How much faster a tiled kernel can get: tiles of keys that tiles of queries visit, as GNA's simulator counts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.mechanisms.base import require
from saccade.types.grids import Line, candidates


class TileCount(NamedTuple):
    """What a kernel that works in tiles has to do.

    Args:
        visited: Tiles of keys that the busiest tile of queries visits.
        total: Tiles of keys that dense attention visits.
        tokens: Keys in all.
        window: Keys that a query sees, at most.
    """

    visited: int
    total: int
    tokens: int
    window: int

    @property
    def speedup(self) -> float:
        """The most that such a kernel gains over its own dense attention."""
        return self.total / self.visited

    @property
    def bound(self) -> float:
        """What counting operations promises: keys over keys seen."""
        return self.tokens / self.window

    @property
    def block_sparse(self) -> bool:
        """Whether no operation is wasted: `speedup` reaches `bound`."""
        return self.total * self.window >= self.tokens * self.visited

    def end_to_end(self, share: float) -> float:
        """Speed-up of a model that spends this share of its time, in [0, 1], on the attention that is replaced."""
        require(0 <= share <= 1, "share", share, "a share in [0, 1]")
        return 1 / (1 - share + share / self.speedup)


def visits(line: Line, q_tile: int, kv_tile: int, *, dynamic: bool) -> int:
    """Most tiles of keys that a tile of queries spans along one axis; each phase of a dilation is tiled on its own."""
    most = 0
    for phase in range(line.step):
        first, last = ((edge[phase :: line.step] - phase) // line.step for edge in (line.first, line.last))
        if len(first) == 0:
            continue
        low, high = -_tile_max(-first, q_tile), _tile_max(last, q_tile)
        spans = -(-(high - low + 1) // kv_tile) if dynamic else high // kv_tile - low // kv_tile + 1
        most = max(most, int(spans.max()))
    return most


def _tile_max(values: Tensor, tile: int) -> Tensor:
    """Largest of every `tile` values."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % tile), value=-(2**62))
    return padded.view(-1, tile).amax(1)


def grid_tiles(lines: Sequence[Line], q_tile: tuple[int, ...], kv_tile: tuple[int, ...], *, dynamic: bool) -> TileCount:
    """Tiles that are boxes of the grid: what they visit is the product over the axes."""
    visited = [visits(*axis, dynamic=dynamic) for axis in zip(lines, q_tile, kv_tile, strict=True)]
    total = [-(-line.size // tile) for line, tile in zip(lines, kv_tile, strict=True)]
    return TileCount(math.prod(visited), math.prod(total), *_sizes(lines))


def flat_tiles(lines: Sequence[Line], q_tile: int, kv_tile: int) -> TileCount:
    """Tiles of consecutive tokens, row after row: they are visited if a query of the tile sees one of their keys."""
    step = math.gcd(q_tile, kv_tile)
    found = candidates(lines, 0, 0, step)
    row, column = found.rows // (q_tile // step), found.indices.long() // (kv_tile // step)
    pairs = torch.unique(row * found.key_blocks + column)
    tokens, window = _sizes(lines)
    return TileCount(int(torch.bincount(pairs // found.key_blocks).max()), -(-tokens // kv_tile), tokens, window)


def _sizes(lines: Sequence[Line]) -> tuple[int, int]:
    """Keys in all, and those that a query sees."""
    return math.prod(line.size for line in lines), math.prod(line.most for line in lines)
