"""HaloNet's layer: blocked local attention with relative embeddings, which can also downsample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import Partition, check_map, on_channels
from saccade.ops import attend
from saccade.types import Kind, Pattern


@register(
    "halonet_attention",
    Kind.LAYER,
    summary="Queries of a block, all or strided, share block and halo as keys, scored with relative embeddings.",
    papers=("Scaling Local Self-Attention for Parameter Efficient Visual Backbones",),
    year=2021,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        (
            "The authors published no code. Details follow halonet-pytorch: full-width row and column embeddings that "
            "are added, scaled like the keys, and keys past the border hidden (in timm they take part as zeros)."
        ),
        "Strided queries keep their true offsets to the keys. The selector `halonet` is the pattern without stride.",
    ),
    example={"dim": 16, "heads": 2, "size": 4, "halo": 1, "stride": 2},
)
class HaloNetAttention(Layer):
    """softmax(D^-0.5 (q_i k_j + q_i (row[y_j - y_i] + column[x_j - x_i]))) v_j over the block of i and its halo.

    Both embedding terms are kept out of any tensor of queries x keys: q gets the logits of all rows and columns as
    further channels, k marks of its row and column.

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        size: Side of a block of queries, in pixels.
        halo: Pixels around the block that it sees, too.
        stride: Every stride-th row and column has a query, the output is that much smaller; divides `size`.
    """

    def __init__(self, dim: int, heads: int = 8, size: int = 8, halo: int = 3, stride: int = 1) -> None:
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(size >= 1, "size", size, "at least 1 pixel")
        require(halo >= 0, "halo", halo, "at least 0 pixels")
        require(stride >= 1 and size % stride == 0, "stride", stride, f"a divisor of size={size}")
        self.dim, self.heads, self.size, self.halo, self.stride = dim, heads, size, halo, stride
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.projection = nn.Linear(dim, dim)
        offsets, depth = 2 * (size + halo) - 1, dim // heads
        self.rows = nn.Parameter(torch.randn(offsets, depth) * depth**-0.5)
        self.columns = nn.Parameter(torch.randn(offsets, depth) * depth**-0.5)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to `[B, C, ceil(height / stride), ceil(width / stride)]`."""
        (x,) = inputs
        check_map(x, self.dim)
        strided = x[:, :, :: self.stride, :: self.stride]
        side = self.size // self.stride
        blocks = Partition((strided.shape[2], strided.shape[3]), (side, side))
        q = self._heads(blocks.split(on_channels(self.query, strided)))  # [W, H, D, side, side]
        window, ones = self.size + 2 * self.halo, x.new_ones(1, 1, *x.shape[2:])
        k, v = self._heads(self._halos(on_channels(self.key_value, x))).chunk(2, 2)  # [W, H, D, window, window]
        marks = torch.eye(window, dtype=x.dtype, device=x.device)
        rows = torch.einsum("whdyx,yjd->whjyx", q, self.rows[self._offsets(side, window, x.device)])
        columns = torch.einsum("whdyx,xjd->whjyx", q, self.columns[self._offsets(side, window, x.device)])
        row_marks = marks[:, :, None].expand(*k.shape[:2], window, window, window)
        column_marks = marks[:, None, :].expand(*k.shape[:2], window, window, window)
        out = attend(
            torch.cat([q, rows, columns], 2).flatten(3).mT,
            torch.cat([k, row_marks, column_marks], 2).flatten(3).mT,
            v.flatten(3).mT,
            scale=(self.dim // self.heads) ** -0.5,
            q_segments=self._real(blocks.split(ones[:, :, :: self.stride, :: self.stride]), len(x)),
            kv_segments=self._real(self._halos(ones), len(x)),
        )
        return on_channels(self.projection, blocks.join(out.mT.flatten(1, 2).unflatten(2, (side, side))))

    def _heads(self, windows: Tensor) -> Tensor:
        """`[W, parts * C, y, x]` to `[W, H, parts * D, y, x]`, the parts of each head together."""
        parts = windows.unflatten(1, (-1, self.heads, self.dim // self.heads))
        return parts.transpose(1, 2).flatten(2, 3)

    def _halos(self, x: Tensor) -> Tensor:
        """`[B, C, Y, X]` to `[B * blocks, C, window, window]`; places past the border are 0."""
        window = self.size + 2 * self.halo
        below, right = (-size % self.size + self.halo for size in x.shape[2:])
        padded = nn.functional.pad(x, (self.halo, right, self.halo, below))
        cut = padded.unfold(2, window, self.size).unfold(3, window, self.size)  # [B, C, rows, columns, window, window]
        return cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)

    def _offsets(self, side: int, window: int, device: torch.device) -> Tensor:
        """Row of an embedding for each query and key of an axis, int64 `[side, window]`."""
        place = torch.arange(side, device=device) * self.stride
        return torch.arange(window, device=device) - place[:, None] + self.size - 1

    @staticmethod
    def _real(ones: Tensor, batch: int) -> Tensor:
        """Segment ids `[B * W, places]`: 0 for pixels of the map, -1 for padding."""
        return (ones.flatten(1) > 0).long().repeat(batch, 1) - 1

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 6 x 7 map of 16 channels."""
        return (torch.randn(batch, 16, 6, 7, generator=generator).to(device, dtype),)
