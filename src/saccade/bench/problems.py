"""Random queries, keys and values with what real ones have: neighbours alike, and queries that like keys near them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RUNS = (1, 4, 16, 64, 256)
"""Tokens over which the parts of random queries, keys and values stay alike."""

SPREAD, NEAR = 3.0, 8.0
"""Standard deviation of random scores, and how much higher a query scores the keys of its own place on average."""


def random_problem(
    shape: Sequence[int],
    *,
    grid: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values in which neighbours are alike and queries like keys near them.

    Each is a sum of equal parts that stay alike over `RUNS` tokens (on a grid, over as many in a box): the correlation
    of neighbours falls with their distance as it does in SmolLM2, to 0.7, 0.5, 0.3 and 0.1 at 1, 4, 16 and 64 tokens.
    Scores have a standard deviation of `SPREAD`; those of keys at the query's own place are `NEAR` higher. On a grid of
    three axes the key/value heads are near by turns along the first axis alone, all places of a frame, and along the
    other two, a place in all frames: video models have such spatial and temporal heads.

    Args:
        shape: `(B, H, G, N, D)`.
        grid: Sizes of the grid that the N tokens lie on, row-major; None for a sequence.
        dtype: Of all three; drawn in fp32.
        device: Of all three; drawn on the CPU.
        seed: Of the draw.

    Returns:
        q `[B, H, N, D]`, k and v `[B, G, N, D]`.

    Raises:
        ValueError: If `shape` is not five positive sizes, G does not divide H, or `grid` has not N tokens.
    """
    if len(shape) != 5 or min(shape) < 1:
        raise ValueError(
            f"shape={tuple(shape)}: expected five sizes (batch, heads, kv heads, tokens, dim) of at least 1"
        )
    batch, heads, groups, tokens, dim = shape
    if heads % groups:
        raise ValueError(f"shape={tuple(shape)}: expected kv heads {groups} to divide heads {heads}")
    axes = (tokens,) if grid is None else tuple(grid)
    if math.prod(axes) != tokens:
        raise ValueError(f"grid={grid}: expected one of {tokens} tokens, as shape={tuple(shape)} has")
    generator = torch.Generator().manual_seed(seed)

    def noise(count: int, along: Sequence[int] | None = None) -> Tensor:
        """`[B, count, N, D]` of variance 1 that varies along some of the axes, or all."""
        varied = range(len(axes)) if along is None else along
        total = torch.zeros(batch, count, *axes, dim)
        for run in RUNS:
            sizes = [size if axis in varied else 1 for axis, size in enumerate(axes)]
            part = torch.randn(batch, count, *sizes, dim, generator=generator)
            for axis in varied:
                part = _averaged(part, min(round(run ** (1 / len(axes))), axes[axis]), axis + 2)
            total += part * len(RUNS) ** -0.5
        return total.view(batch, count, tokens, dim)

    q, k, v = noise(heads), noise(groups), noise(groups)
    turns: tuple[Sequence[int] | None, ...] = ((0,), (1, 2)) if len(axes) == 3 else (None,)
    place = torch.cat([noise(1, turns[head % len(turns)]) for head in range(groups)], 1)
    share = min(NEAR / (SPREAD * dim**0.5), 1.0)
    q, k = (
        (SPREAD * (1 - share)) ** 0.5 * x + (SPREAD * share) ** 0.5 * place.repeat_interleave(x.shape[1] // groups, 1)
        for x in (q, k)
    )
    return q.to(dtype).to(device), k.to(dtype).to(device), v.to(dtype).to(device)


def _averaged(x: Tensor, width: int, axis: int) -> Tensor:
    """Sums of `width` neighbours along an axis that closes on itself, of the variance of x."""
    size = x.shape[axis]
    sums = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x, x.narrow(axis, 0, width - 1)], axis).cumsum(axis)
    return (sums.narrow(axis, width, size) - sums.narrow(axis, 0, size)) * width**-0.5
