"""Inf-DiT's layer: blocks attend to themselves and three neighbours told apart by embeddings, row by row if need be."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import Partition, check_map, on_channels
from saccade.ops import attend
from saccade.types import Kind, Pattern


class BlockRows(NamedTuple):
    """Rows of blocks: what the next row needs of this one is all that is kept.

    Args:
        k: Keys `[B, rows, columns, H, places, D]`.
        v: Values, likewise.
        real: Int `[B, rows, columns, places]`: 0 for pixels of the map, -1 for padding.
    """

    k: Tensor
    v: Tensor
    real: Tensor


@register(
    "uniba_attention",
    Kind.LAYER,
    summary="Blocks of the map attend to themselves and the three blocks before them; whole, or row after row.",
    papers=("Inf-DiT: Upsampling Any-Resolution Image with Memory-Efficient Diffusion Transformer",),
    year=2024,
    code="THUDM/Inf-DiT",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        (
            "The attention alone: no rotary embedding, adaptive layer norm or cross-attention to the low-resolution "
            "image. The selector `uniba` is its pattern, without the embeddings."
        ),
        (
            "Sides that `size` does not divide: blocks at the end are padded, and padding hidden. The authors refuse "
            "them; so they do maps smaller than a block, which are one block here."
        ),
        "Keys are normalised by the norm of the queries, as in the authors' code.",
    ),
    example={"dim": 16, "heads": 2, "size": 3},
)
class UniBAAttention(Layer):
    """softmax(Q [K_b + e_b]^T / sqrt(D)) [V_b] over four blocks b, then a projection.

    These are the block itself, and those to the upper left, to the left and above; e_b is learned for each of the four
    and each head. Where the map ends, the nearest block of the row or column stands in for the missing one (the upper
    left corner attends to itself four times, by four embeddings).

    `row` does one row of blocks, given what it returned for the row before. An image of any height so needs memory for
    two rows of blocks, layer by layer.

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        size: Side of a block in pixels of the map.
        direction: "lt": neighbours are above and to the left; "rb": below and to the right.
        norm: LayerNorm of the queries and keys of each head.
        qkv_bias: Bias of the query, key and value projection.
    """

    def __init__(
        self, dim: int, heads: int = 8, size: int = 32, direction: Literal["lt", "rb"] = "lt", norm: bool = True,
        qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(size >= 1, "size", size, "at least 1 pixel")
        require(direction in ("lt", "rb"), "direction", direction, "'lt' or 'rb'")
        self.dim, self.heads, self.size, self.forwards = dim, heads, size, direction == "rb"
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = nn.LayerNorm(dim // heads, eps=1e-6) if norm else nn.Identity()
        self.neighbours = nn.Parameter(torch.zeros(4, heads, 1, dim // heads))
        self.projection = nn.Linear(dim, dim)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape, any height and width."""
        (x,) = inputs
        check_map(x, self.dim)
        cut = Partition.of(x, self.size)
        q, here = self._blocks(x, cut)
        before = BlockRows(*(self._before(part, 1) for part in here))
        return self._attend(q, here, before, cut)

    def row(self, x: Tensor, before: BlockRows | None = None) -> tuple[Tensor, BlockRows]:
        """One row of blocks, as `forward` does it for the whole map.

        Args:
            x: `[B, C, size, width]`; the last row of a map may be lower.
            before: What this returned for the row above (below, with direction "rb"); None for the first one.

        Returns:
            Output of the shape of x, and what the next row needs.
        """
        check_map(x, self.dim)
        if x.shape[2] > self.size:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected one row of blocks, height up to size={self.size}")
        cut = Partition((x.shape[2], x.shape[3]), (self.size, min(self.size, x.shape[3])))
        q, here = self._blocks(x, cut)
        return self._attend(q, here, here if before is None else before, cut), here

    def _blocks(self, x: Tensor, cut: Partition) -> tuple[Tensor, BlockRows]:
        """Queries `[B * blocks, H, places, D]`, and keys and values by row and column of blocks."""
        windows = cut.split(on_channels(self.qkv, x)).flatten(2)
        q, k, v = (part.unflatten(1, (self.heads, -1)).mT for part in windows.chunk(3, 1))
        real = cut.segments(len(x), x.device)
        real = torch.zeros(len(windows), windows.shape[2], dtype=torch.int64, device=x.device) if real is None else real
        here = BlockRows(*(part.unflatten(0, (len(x), *cut.counts)) for part in (self.norm(k), v, real)))
        return self.norm(q), here

    def _before(self, x: Tensor, axis: int) -> Tensor:
        """For each block the one before it along an axis, itself if there is none."""
        count = x.shape[axis]
        place = torch.arange(count, device=x.device) + (1 if self.forwards else -1)
        return x.index_select(axis, place.clamp(0, count - 1))

    def _attend(self, q: Tensor, here: BlockRows, before: BlockRows, cut: Partition) -> Tensor:
        """Attention of each block to its four, projected: `[B, C, Y, X]`."""
        aside, corner = (BlockRows(*(self._before(part, 2) for part in rows)) for rows in (here, before))
        four = (here, corner, aside, before)
        k = torch.cat([rows.k + embedding for rows, embedding in zip(four, self.neighbours, strict=True)], 4)
        v = torch.cat([rows.v for rows in four], 4)
        real = torch.cat([rows.real for rows in four], 3).flatten(0, 2)
        out = attend(q, k.flatten(0, 2), v.flatten(0, 2), q_segments=here.real.flatten(0, 2), kv_segments=real)
        return on_channels(self.projection, cut.join(out.mT.flatten(1, 2).unflatten(2, cut.window)))

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 6 x 7 map of 16 channels."""
        return (torch.randn(batch, 16, 6, 7, generator=generator).to(device, dtype),)
