"""Boxes: patterns on a grid in which every query sees an interval of keys along each axis. For example windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from saccade.types.base import TokenIndex
from saccade.types.grids import GATHER_COST, Line, candidates, grid_layout, neighbours
from saccade.types.layout import BlockLayout


@dataclass(frozen=True, eq=False)
class Boxes:
    """Query at x of a grid sees the keys y with first <= y <= last and y % dilation == x % dilation along every axis.

    Args:
        first: int32 `[sum of sizes]`, on the CPU: first key of each coordinate's window, one axis after another. Both
            ends rise, weakly, from a coordinate to the next one `dilation` further, and lie in its own class.
        last: int32 `[sum of sizes]`, last key; not before the first.
        sizes: Of one to three axes, row-major; M = N is their product.
        dilation: Gap between neighbours along each axis.
        block: Block size, in tokens, where a `BlockLayout` stands in for the boxes.

    Raises:
        ValueError: If the shapes do not fit.
    """

    first: Tensor
    last: Tensor
    sizes: tuple[int, ...]
    dilation: tuple[int, ...]
    block: int = 64

    def __post_init__(self) -> None:
        if not 1 <= len(self.sizes) <= 3 or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes}: expected one to three sizes, each at least 1")
        if len(self.dilation) != len(self.sizes) or min(self.dilation) < 1:
            raise ValueError(f"dilation={self.dilation}: expected one for each of sizes={self.sizes}, at least 1")
        for name in ("first", "last"):
            ends = getattr(self, name)
            if ends.shape != (sum(self.sizes),) or ends.dtype != torch.int32 or ends.device.type != "cpu":
                raise ValueError(
                    f"{name} of dtype {ends.dtype}, shape {tuple(ends.shape)} on {ends.device}: expected torch.int32, "
                    f"({sum(self.sizes)},) on cpu"
                )

    @classmethod
    def of(cls, lines: Sequence[Line], block: int = 64) -> Boxes:
        """From the windows of each axis."""
        first, last = torch.cat([line.first for line in lines]), torch.cat([line.last for line in lines])
        return cls(
            first.int().cpu(),
            last.int().cpu(),
            tuple(line.size for line in lines),
            tuple(line.step for line in lines),
            block,
        )

    @property
    def queries(self) -> int:
        """M."""
        return math.prod(self.sizes)

    @property
    def keys(self) -> int:
        """N = M."""
        return math.prod(self.sizes)

    def lines(self, device: torch.device | str = "cpu") -> list[Line]:
        """The windows of each axis."""
        ends = (self.first.long().to(device).split(self.sizes), self.last.long().to(device).split(self.sizes))
        return [
            Line(first, last, step, int((last - first).max()) // step + 1)
            for first, last, step in zip(*ends, self.dilation, strict=True)
        ]

    def validate(self) -> None:
        """Check the contents.

        Raises:
            ValueError: Naming the axis whose windows leave the grid or their class, are empty or do not rise.
        """
        for axis, (first, last, step, _) in enumerate(self.lines()):
            x = torch.arange(len(first))
            good = (first >= 0) & (last < len(first)) & (first <= last)
            good &= ((first - x) % step == 0) & ((last - x) % step == 0)
            if not bool(good.all()):
                at = int((~good).nonzero()[0])
                raise ValueError(
                    f"axis {axis}: window {int(first[at])} .. {int(last[at])} of coordinate {at}: expected one within "
                    f"0 .. {len(first) - 1}, not empty, in steps of {step} from {at}"
                )
            for ends in (first, last):
                if bool((ends[step:] < ends[:-step]).any()):
                    raise ValueError(f"axis {axis}: expected windows whose ends rise along the axis")

    def density(self) -> float:
        """Fraction of the M x N pairs that is kept."""
        kept = 1.0
        for first, last, step, _ in self.lines():
            kept *= float(((last - first) // step + 1).sum()) / len(first) ** 2
        return kept

    def to_dense(self) -> Tensor:
        """The bool mask `[1, 1, M, N]`. For small sizes: it is M x N."""
        mask = torch.ones(1, 1, dtype=torch.bool)
        for first, last, step, _ in self.lines():
            x = torch.arange(len(first))
            along = (x >= first[:, None]) & (x <= last[:, None]) & ((x - x[:, None]) % step == 0)
            mask = torch.kron(mask, along)
        return mask[None, None]

    def to_index(self, device: torch.device | str = "cpu") -> TokenIndex:
        """The same pairs as lists of keys."""
        return TokenIndex(neighbours(self.lines(device))[None, None], self.queries, self.keys)

    def to_layout(self, device: torch.device | str = "cpu") -> BlockLayout:
        """The same pairs as blocks."""
        lines = self.lines(device)
        return grid_layout(lines, 0, 0, candidates(lines, 0, 0, self.block))

    def portable(self, device: torch.device | str = "cpu") -> BlockLayout | TokenIndex:
        """The same pairs in whichever form is cheaper in portable PyTorch; kept for the next call."""
        ends = (tuple(end.tolist()) for end in (self.first, self.last))
        return _portable(*ends, self.sizes, self.dilation, self.block, str(device))


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # kept tensors may serve a backward pass later
def _portable(
    first: tuple[int, ...], last: tuple[int, ...], sizes: tuple[int, ...], dilation: tuple[int, ...], block: int,
    device: str,
) -> BlockLayout | TokenIndex:  # fmt: skip
    """The form of `Boxes` that is cheaper in portable PyTorch: blocks waste the rest of each, lists are gathered."""
    boxes = Boxes(torch.tensor(first).int(), torch.tensor(last).int(), sizes, dilation, block)
    lines = boxes.lines(device)
    blocks = candidates(lines, 0, 0, block)
    listed = boxes.density() * boxes.queries * boxes.keys
    if len(blocks.indices) * block * block > GATHER_COST * listed:
        return boxes.to_index(device)
    return grid_layout(lines, 0, 0, blocks)
