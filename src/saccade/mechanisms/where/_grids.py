"""Patterns on a grid from windows along its axes: a query sees the box of keys that its windows span, axis by axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.mechanisms.base import require
from saccade.types import BlockLayout, Geometry, TokenIndex

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


def grid_of(queries: int, keys: int, geometry: Geometry) -> tuple[int, ...]:
    """The grid of a call, checked; without `geometry.grid` all tokens lie on one axis.

    Args:
        queries: M.
        keys: N.
        geometry: Of the call.

    Returns:
        Sizes of one to three axes.

    Raises:
        ValueError: If there are fewer queries than keys, or other tokens than those of the grid and the text.
    """
    require(queries == keys, "queries", queries, f"{keys}, as many as keys")
    grid = (keys,) if geometry.grid is None else geometry.grid
    inside = math.prod(grid) + geometry.prefix + geometry.suffix
    expected = f"{inside}, the tokens of grid={grid} with prefix={geometry.prefix}, suffix={geometry.suffix}"
    require(inside == keys, "tokens", keys, expected)
    return grid


def per_axis(value: object, name: str, grid: tuple[int, ...]) -> tuple:
    """The setting `name`, one value or one for each axis, as one for each axis of the grid."""
    values = value if isinstance(value, tuple) else (value,) * len(grid)
    require(len(values) == len(grid), name, value, f"one for each of the {len(grid)} axes of grid={grid}")
    return values


def is_per_axis(value: object, least: int) -> bool:
    """Whether `value` is an int of at least `least`, or one to three of them."""
    sizes = value if isinstance(value, tuple) else (value,)
    return 1 <= len(sizes) <= 3 and all(isinstance(x, int) and x >= least for x in sizes)


def grid_pattern(
    lines: Sequence[Line], prefix: int, suffix: int, block: int, inside: Inside | None = None
) -> BlockLayout | TokenIndex:
    """The pattern of these windows for all heads; text before and after the grid sees and is seen by all.

    Args:
        lines: One for each axis, row-major.
        prefix: Tokens before the grid.
        suffix: Tokens after the grid.
        block: Block size in tokens, if a layout is cheaper than lists of neighbours.
        inside: Keeps part of each box; None keeps all of it.

    Returns:
        The cheaper form.
    """
    return head_patterns([(1, lines)], prefix, suffix, block, inside)


def head_patterns(
    parts: Sequence[tuple[int, Sequence[Line]]], prefix: int, suffix: int, block: int, inside: Inside | None = None
) -> BlockLayout | TokenIndex:
    """`grid_pattern` for `(heads, lines)` after `(heads, lines)`, all of one grid.

    Block products waste the rest of each block, lists of neighbours have to be gathered. Text tokens see everything,
    which lists of equal length cannot hold; with them it is always blocks.
    """
    tokens = math.prod(line.size for line in parts[0][1])
    candidates = [_candidates(lines, prefix, suffix, block) for _, lines in parts]
    gathered = sum(heads * tokens * math.prod(line.most for line in lines) for heads, lines in parts)
    products = sum(heads * len(found.indices) for (heads, _), found in zip(parts, candidates, strict=True))
    if prefix + suffix == 0 and products * block * block > GATHER_COST * gathered:
        lists = [neighbours(lines, inside) for _, lines in parts]
        longest = max(found.shape[1] for found in lists)
        padded = [torch.nn.functional.pad(found, (0, longest - found.shape[1]), value=-1) for found in lists]
        each = [found[None].expand(heads, -1, -1) for (heads, _), found in zip(parts, padded, strict=True)]
        return TokenIndex(torch.cat(each)[None], tokens, tokens)
    layouts = [
        _layout(lines, prefix, suffix, found, inside).expand(1, heads)
        for (heads, lines), found in zip(parts, candidates, strict=True)
    ]
    return stack_heads(layouts)


def stack_heads(layouts: Sequence[BlockLayout]) -> BlockLayout:
    """Layouts of batch 1, the heads of one after those of another."""
    entries, patterns, kinds, indptr = 0, 0, [], [layouts[0].indptr[:1]]
    for layout in layouts:
        kinds.append(torch.where(layout.kinds >= 0, layout.kinds + patterns, layout.kinds))
        indptr.append(layout.indptr[1:] + entries)
        entries, patterns = entries + len(layout.indices), patterns + len(layout.bits)
    return replace(
        layouts[0],
        indptr=torch.cat(indptr),
        indices=torch.cat([layout.indices for layout in layouts]),
        kinds=torch.cat(kinds),
        bits=torch.cat([layout.bits for layout in layouts]),
        heads=sum(layout.heads for layout in layouts),
    )


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


def _candidates(lines: Sequence[Line], prefix: int, suffix: int, block: int) -> BlockLayout:
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


def _layout(
    lines: Sequence[Line], prefix: int, suffix: int, candidates: BlockLayout, inside: Inside | None
) -> BlockLayout:
    """The exact pairs of the candidate blocks, and text that sees and is seen by all."""
    tokens = math.prod(line.size for line in lines)
    total, block, device = candidates.queries, candidates.block, candidates.device

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

    layout = BlockLayout.from_mask_mod(near, total, total, block=block, candidates=candidates)
    if prefix + suffix == 0:
        return layout
    text = torch.cat([torch.arange(prefix, device=device), torch.arange(total - suffix, total, device=device)])
    return layout | BlockLayout.tokens(
        total, total, key_tokens=text, query_tokens=text, block=block, device=device
    )  # fmt: skip
