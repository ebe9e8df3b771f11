"""Patterns on a grid from windows along its axes: a query sees the box of keys that its windows span, axis by axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from saccade.mechanisms.base import require
from saccade.types import BlockLayout, Geometry, TokenIndex
from saccade.types.grids import GATHER_COST, Inside, Line, candidates, grid_layout, neighbours


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
    blocks = [candidates(lines, prefix, suffix, block) for _, lines in parts]
    gathered = sum(heads * tokens * math.prod(line.most for line in lines) for heads, lines in parts)
    products = sum(heads * len(found.indices) for (heads, _), found in zip(parts, blocks, strict=True))
    if prefix + suffix == 0 and products * block * block > GATHER_COST * gathered:
        lists = [neighbours(lines, inside) for _, lines in parts]
        longest = max(found.shape[1] for found in lists)
        padded = [torch.nn.functional.pad(found, (0, longest - found.shape[1]), value=-1) for found in lists]
        each = [found[None].expand(heads, -1, -1) for (heads, _), found in zip(parts, padded, strict=True)]
        return TokenIndex(torch.cat(each)[None], tokens, tokens)
    layouts = [
        grid_layout(lines, prefix, suffix, found, inside).expand(1, heads)
        for (heads, lines), found in zip(parts, blocks, strict=True)
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


__all__ = [
    "GATHER_COST", "Inside", "Line", "grid_of", "grid_pattern", "head_patterns", "is_per_axis", "neighbours",
    "per_axis", "stack_heads",
]  # fmt: skip
