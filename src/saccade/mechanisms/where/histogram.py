"""Histogram self-attention: pixels sorted by intensity and cut into bins, whose contents attend to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import check_map
from saccade.ops import attend
from saccade.types import Kind, Pattern


@register(
    "histogram",
    Kind.LAYER,
    summary="Pixels sorted by intensity fall into bins; attention across channels and bins, by bins and by frequency.",
    papers=("Restoring Images in Adverse Weather Conditions via Histogram Transformer",),
    year=2024,
    code="sunshangquan/Histoformer",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        "The attention alone: no norm, feed-forward network or skip connection.",
        (
            "The number of bins is a setting; in the authors' code it is the number of heads, which is the default. "
            "Sorting costs N log N, which the counted work leaves out."
        ),
        "Sorts are stable, so that equal intensities have one answer on every device.",
    ),
    example={"dim": 8, "heads": 2, "bins": 3},
)
class HistogramAttention(Layer):
    """Dynamic-range convolution, then two attentions over sorted pixels, multiplied.

    The first half of the channels is sorted along the height, then along the width; a 1 x 1 and a depthwise 3 x 3
    convolution give two pairs of queries and keys, and values. In each channel the values of all N pixels are sorted,
    and queries and keys put in their order. The first pair cuts this sequence into `bins` runs of N / bins pixels (by
    bins), the second deals it out to `bins` sets in turn (by frequency). Each bin of each channel is one token whose
    features are its pixels: with unit q and k, and temperature t of each head,

        weights = exp(t q k^T) / (1 + sum exp(t q k^T)),   out = project(unsort(weights_1 v) * unsort(weights_2 v))

    over the bins of a head's channels; at last the sorts of the first half are undone.

    Args:
        dim: Channels C, in and out; even.
        heads: H; divides C.
        bins: Parts into which the sorted pixels are cut; None means as many as heads.
        bias: Bias of the convolutions.
    """

    def __init__(self, dim: int, heads: int = 8, bins: int | None = None, bias: bool = False) -> None:
        super().__init__()
        require(dim >= 2 and dim % 2 == 0, "dim", dim, "an even number of channels, at least 2")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(bins is None or bins >= 1, "bins", bins, "at least 1 bin, or None")
        self.dim, self.heads, self.bins = dim, heads, heads if bins is None else bins
        self.temperature = nn.Parameter(torch.ones(heads))
        self.qkv = nn.Conv2d(dim, 5 * dim, 1, bias=bias)
        self.around = nn.Conv2d(5 * dim, 5 * dim, 3, padding=1, groups=5 * dim, bias=bias)
        self.projection = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape, any height and width."""
        (x,) = inputs
        check_map(x, self.dim)
        first, rest = x.chunk(2, 1)
        first, rows = self._sort(first, 2)
        first, columns = self._sort(first, 3)
        mixed = self.around(self.qkv(torch.cat([first, rest], 1))).flatten(2)
        *pairs, v = mixed.chunk(5, 1)
        v, order = self._sort(v, 2)
        q1, k1, q2, k2 = (part.gather(2, order) for part in pairs)
        product = self._attend(q1, k1, v, by_bins=True) * self._attend(q2, k2, v, by_bins=False)
        product = torch.zeros_like(product).scatter(2, order, product).unflatten(2, x.shape[2:])
        first, rest = self.projection(product).chunk(2, 1)
        first = torch.zeros_like(first).scatter(3, columns, first)
        return torch.cat([torch.zeros_like(first).scatter(2, rows, first), rest], 1)

    @staticmethod
    def _sort(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """The values ascending along an axis, and where each was."""
        values, order = x.sort(stable=True, dim=dim)
        return values, order

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, by_bins: bool) -> Tensor:
        """Attention over the bins of sorted `[B, C, N]`: the same shape."""
        pixels = q.shape[2]
        size = -(-pixels // self.bins)
        parts = (self.bins, size) if by_bins else (size, self.bins)
        heads = []
        for x in (q, k, v):
            cut = nn.functional.pad(x, (0, self.bins * size - pixels)).unflatten(2, parts)
            heads.append((cut if by_bins else cut.mT).unflatten(1, (self.heads, -1)).flatten(2, 3))
        q, k = (nn.functional.normalize(x, dim=-1) for x in heads[:2])
        q = q * self.temperature[:, None, None]
        out = attend(q, k, heads[2], scale=1.0, sinks=torch.zeros_like(self.temperature))  # the sink is the 1 +
        out = out.flatten(1, 2).unflatten(1, (self.dim, self.bins))
        return (out if by_bins else out.mT).flatten(2)[..., :pixels]

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 5 x 4 map of 8 channels."""
        return (torch.randn(batch, 8, 5, 4, generator=generator).to(device, dtype),)
