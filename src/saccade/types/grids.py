"""Patterns on a grid from windows along its axes: as blocks and as lists of keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.types.layout import BlockLayout

GATHER_COST = 8
"""Pairs of a block product that take as long as one gathered pair: 6 to 8 measured with the eager engines on a CPU."""

Inside = Callable[[Sequence[Tensor]], Tensor]
"""Which of a box's pairs are kept, from the offsets key - query along every axis."""


class Line(NamedTuple):
    """The windows along one axis: place x sees `first[x], first[x] + step, ..., last[x]`.

    Args:
        first: int64 `[size]`.
        last: int64 `[size]`; `last[x] - first[x]` is a multiple of `step`, and so is `first[x] - x`.
        step: Gap between neighbours.
        most: Most neighbours of a place.
    """

    first: Tensor
    last: Tensor
    step: int
    most: int

    @property
    def size(self) -> int:
        """Places along the axis."""
        return len(self.first)


def neighbours(lines: Sequence[Line], inside: Inside | None = None) -> Tensor:
    """Grid positions of every token's neighbours, int64 `[tokens, most neighbours]`; -1 = none."""
    index = torch.zeros(1, 1, dtype=torch.int64, device=lines[0].first.device)
    for first, last, step, most in lines:
        along = first[:, None] + step * torch.arange(most, device=first.device)
        along = torch.where(along <= last[:, None], along, -1)
        both = index[:, None, :, None] * len(first) + along[None, :, None, :]
        hidden = (index < 0)[:, None, :, None] | (along < 0)[None, :, None, :]
        index = both.masked_fill(hidden, -1).flatten(2).flatten(0, 1)
    if inside is None:
        return index
    here = torch.arange(len(index), device=index.device)[:, None]
    kept = inside(_offsets(lines, here, index.clamp(min=0))) & (index >= 0)
    return index.masked_fill(~kept, -1).sort(-1, descending=True).values[:, : int(kept.sum(-1).max())]


def _offsets(lines: Sequence[Line], query: Tensor, key: Tensor) -> list[Tensor]:
    """Offsets key - query along every axis, from grid positions."""
    offsets = []
    for line in reversed(lines):
        offsets.append(key % line.size - query % line.size)
        query, key = query // line.size, key // line.size
    return offsets[::-1]


def candidates(lines: Sequence[Line], prefix: int, suffix: int, block: int) -> BlockLayout:
    """Blocks that hold a grid pair: the runs of keys that the stretches of each query block span, row by row."""
    width, (first, last, *_) = lines[-1].size, lines[-1]
    tokens = math.prod(line.size for line in lines)
    total, device = prefix + tokens + suffix, first.device
    query = torch.arange(tokens, device=device)
    row, query_block = query // width, (query + prefix) // block
    stretch = torch.unique_consecutive(query_block * tokens + row, return_inverse=True)[1]
    count = int(stretch[-1]) + 1
    low = torch.full((count,), width, device=device).scatter_reduce_(0, stretch, first[query % width], "amin")
    high = torch.zeros(count, dtype=torch.int64, device=device)
    high.scatter_reduce_(0, stretch, last[query % width], "amax")
    start = torch.full((count,), tokens, device=device).scatter_reduce_(0, stretch, query, "amin")
    rows = neighbours(lines[:-1])[start // width] if len(lines) > 1 else torch.zeros_like(start)[:, None]
    from_block = (rows * width + low[:, None] + prefix) // block
    to_block = (rows * width + high[:, None] + prefix) // block
    columns = torch.where(rows < 0, 0, to_block - from_block + 1).flatten()
    key_blocks = -(-total // block)
    base = (query_block[start][:, None] * key_blocks + from_block).flatten().repeat_interleave(columns)
    step = torch.arange(len(base), device=device) - (columns.cumsum(0) - columns).repeat_interleave(columns)
    code = torch.unique(base + step)
    per_row = torch.bincount(code // key_blocks, minlength=-(-total // block))
    return BlockLayout(
        indptr=torch.nn.functional.pad(per_row.cumsum(0), (1, 0)),
        indices=(code % key_blocks).int(),
        kinds=torch.full((len(code),), -1, dtype=torch.int32, device=device),
        bits=torch.empty(0, -(-block * block // 8), dtype=torch.uint8, device=device),
        batch=1, heads=1, queries=total, keys=total, block=(block, block),
    )  # fmt: skip


def grid_layout(
    lines: Sequence[Line], prefix: int, suffix: int, blocks: BlockLayout, inside: Inside | None = None
) -> BlockLayout:
    """The exact pairs of the candidate blocks, and text that sees and is seen by all."""
    tokens = math.prod(line.size for line in lines)
    total, block, device = blocks.queries, blocks.block, blocks.device

    def near(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i, j = i - prefix, j - prefix
        kept = (i >= 0) & (i < tokens) & (j >= 0) & (j < tokens)
        i, j = i.clamp(0, tokens - 1), j.clamp(0, tokens - 1)
        if inside is not None:
            kept = kept & inside(_offsets(lines, i, j))
        for line in reversed(lines):
            x, y = i % line.size, j % line.size
            kept = kept & (y >= line.first[x]) & (y <= line.last[x])
            if line.step > 1:
                kept = kept & (y % line.step == x % line.step)
            i, j = i // line.size, j // line.size
        return kept

    layout = BlockLayout.from_mask_mod(near, total, total, block=block, candidates=blocks)
    if prefix + suffix == 0:
        return layout
    text = torch.cat([torch.arange(prefix, device=device), torch.arange(total - suffix, total, device=device)])
    return layout | BlockLayout.tokens(
        total, total, key_tokens=text, query_tokens=text, block=block, device=device
    )  # fmt: skip
