"""CLEAR: every image token sees the tokens within a circle around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Selector, require
from saccade.mechanisms.where._grids import Line, grid_of, grid_pattern
from saccade.types import BlockLayout, Geometry, Kind, Pattern, TokenIndex


@register(
    "clear",
    Kind.SELECTOR,
    summary="Image tokens see those within a circle around them, for diffusion transformers made linear.",
    papers=("CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",),
    year=2024,
    code="Huage001/CLEAR",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=False,
    exact_when="radius > the diagonal of the grid",
    complexity="N",
    deviations=(
        (
            "The pattern alone. The authors fine-tune the attention layers on it against the full-attention teacher; "
            "that training, their pooled far-away tokens (`down_factor`) and their scale for other lengths "
            "(`proportional_attention`) are not built."
        ),
        "Grids of one to three axes; theirs has two. Text may also come after the grid.",
    ),
    example={"radius": 4.0, "block": 8},
    exact=lambda n: {"radius": float(max(n, 1))},
    ladder=lambda n: tuple(  # of a square image 1, 5, 20 and 78 %
        {"radius": max(n**0.5 / part, 1.0), "block": min(64, max(n // 16, 1))} for part in (16, 8, 4, 2)
    ),
)
@dataclass(frozen=True)
class Clear(Selector):
    """Query at x sees the keys at y with |y - x|^2 < radius^2; text before and after the grid sees and is seen by all.

    Args:
        radius: In tokens; the authors use 8, 16 and 32.
        block: Block size of the layout, in tokens, where a layout is cheaper than lists of neighbours.
    """

    radius: float = 16.0
    block: int = 64

    def __post_init__(self) -> None:
        require(0 < self.radius < math.inf, "radius", self.radius, "a finite number of tokens above 0")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout | TokenIndex:
        """The circles of this grid."""
        grid = grid_of(q.shape[2], k.shape[2], geometry)
        return _circles(grid, self.radius, geometry.prefix, geometry.suffix, self.block, str(q.device))


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # kept tensors may serve a backward pass later
def _circles(
    grid: tuple[int, ...], radius: float, prefix: int, suffix: int, block: int, device: str
) -> BlockLayout | TokenIndex:
    """The squares around the circles, and what of them lies inside."""
    reach = min(math.ceil(radius) - 1, max(grid))

    def inside(offsets: Sequence[Tensor]) -> Tensor:
        squares = [offset.square() for offset in offsets]
        return torch.stack(torch.broadcast_tensors(*squares)).sum(0) < radius**2

    lines = []
    for size in grid:
        x = torch.arange(size, device=device)
        first, last = (x - reach).clamp(min=0), (x + reach).clamp(max=size - 1)
        lines.append(Line(first, last, 1, int((last - first).max()) + 1))
    return grid_pattern(lines, prefix, suffix, block, inside)
