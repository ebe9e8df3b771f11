"""PoolFormer: token mixing by average pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.types import Kind


@register(
    "poolformer",
    Kind.LAYER,
    summary="Each token becomes the mean of its neighbourhood, minus itself.",
    papers=("MetaFormer Is Actually What You Need for Vision",),
    year=2021,
    code="sail-sg/poolformer",
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=("The mixer alone, without the block's norms and MLP; grids of one axis work too.",),
    example={"size": 3},
)
class PoolFormer(Layer):
    """out = AvgPool(x) - x, with stride 1; cells past the border do not count. The block's residual adds x back.

    Args:
        size: Side of the pooling window, odd.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        require(size >= 1 and size % 2 == 1, "size", size, "an odd number of at least 1")
        self.size = size

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Mix a feature map.

        Args:
            x: `[B, C, *grid]` with one or two grid axes.

        Returns:
            The same shape.

        Raises:
            ValueError: If the number of dimensions is wrong.
        """
        require(x.ndim in (3, 4), "x.shape", tuple(x.shape), "[B, C, *grid] with one or two grid axes")
        pool: Any = functional.avg_pool1d if x.ndim == 3 else functional.avg_pool2d
        return pool(x, self.size, stride=1, padding=self.size // 2, count_include_pad=False) - x

    @classmethod
    def sample_inputs(
        cls, batch: int, generator: torch.Generator, dtype: torch.dtype, device: Any
    ) -> tuple[Tensor, ...]:
        """A 5 x 4 map of 3 channels."""
        return (torch.randn(batch, 3, 5, 4, generator=generator, dtype=dtype, device=device),)
