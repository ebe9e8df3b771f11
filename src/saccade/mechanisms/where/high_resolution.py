"""FlexAttention for high-resolution vision-language models: where text looks decides which fine tokens it gets."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.ops import attend, gather_attend, merge
from saccade.types import Kind, Pattern, TokenIndex


@register(
    "high_resolution",
    Kind.LAYER,
    summary="The previous layer's map over a coarse image chooses the fine tokens that each text token also reads.",
    papers=("FlexAttention for Efficient High-Resolution Vision-Language Models",),
    year=2024,
    code="UMass-Foundation-Model/FlexAttention",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N^2",
    deviations=(
        (
            "The layer without rotary positions, which the authors give to text, coarse and fine keys; and without "
            "their blend of both outputs in the first steps of training."
        ),
        "Every text token behind the image has a map and a choice of its own, as in the authors' training code.",
        "The margins that the authors clear, where an image was padded to a square, are left to who makes the map.",
        "A map that is the same everywhere chooses nothing; theirs divides by zero.",
    ),
    example={"dim": 8, "heads": 2, "grid": (2, 3), "zoom": 2, "before": 1, "regions": 2},
)
class HighResolutionAttention(Layer):
    """Causal attention over text and coarse image; text behind the image also sees its chosen fine tokens.

    A token's map m over the coarse image is min-max normalised; places with m > threshold are marked, any of them marks
    its region (one of `regions` x `regions`), and marked regions choose the fine tokens that lie nearest. These have
    key and value projections of their own, and share one softmax with the keys of text and coarse image. The map for
    the next layer is the softmax without fine keys, over the coarse image, summed over heads (`with_map`).

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        grid: Height and width of the coarse image, in tokens.
        zoom: Fine tokens for each coarse one, along each axis.
        before: Tokens of text before the image.
        threshold: Share of the map's range, in [0, 1], above which a place is marked; the authors' is 64 / 255.
        regions: Regions along each axis that are chosen as wholes.
        bias: Bias of the projections to queries, keys and values.
    """

    def __init__(
        self, dim: int, heads: int = 8, grid: tuple[int, int] = (24, 24), zoom: int = 3, before: int = 0,
        threshold: float = 64 / 255, regions: int = 9, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(min(grid) >= 1, "grid", grid, "at least 1 token high and wide")
        require(zoom >= 1, "zoom", zoom, "at least 1")
        require(before >= 0, "before", before, "at least 0 tokens")
        require(0 <= threshold <= 1, "threshold", threshold, "a share in [0, 1]")
        require(regions >= 1, "regions", regions, "at least 1")
        self.dim, self.heads, self.grid, self.zoom, self.before = dim, heads, grid, zoom, before
        self.threshold, self.regions = threshold, regions
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.fine_key_value = nn.Linear(dim, 2 * dim, bias=bias)
        self.projection = nn.Linear(dim, dim, bias=bias)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tokens `[B, N, C]`, fine ones `[B, F, C]` and the map `[B, T, cells]` of the last T tokens to `[B, N, C]`."""
        return self.with_map(*inputs)[0]

    def with_map(self, tokens: Tensor, fine: Tensor, attention_map: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the map for the next layer.

        Args:
            tokens: `[B, N, C]`: `before` tokens of text, the coarse image in rows, and at least T tokens of text.
            fine: `[B, F, C]`: the fine image in rows, zoom^2 tokens for each coarse one.
            attention_map: `[B, T, cells]`: of the previous layer, for the last T tokens.

        Returns:
            `[B, N, C]` and `[B, T, cells]`.

        Raises:
            ValueError: If a shape does not fit, naming it.
        """
        self._check(tokens, fine, attention_map)
        texts, cells = attention_map.shape[1], self.grid[0] * self.grid[1]
        q, k, v = (self._heads(part) for part in self.qkv(tokens).chunk(3, -1))
        out, lse = cast("tuple[Tensor, Tensor]", attend(q, k, v, causal=True, return_lse=True))
        asking = q[:, :, q.shape[2] - texts :]
        fine_k, fine_v = (self._heads(part) for part in self.fine_key_value(fine).chunk(2, -1))
        index = TokenIndex(self._lists(self.chosen(attention_map)), texts, fine.shape[1])
        found = gather_attend(asking, fine_k, fine_v, index, return_lse=True)
        early = tokens.shape[1] - texts
        joined, _ = merge([(out[:, :, early:], lse[:, :, early:]), found])
        coarse = k[:, :, self.before : self.before + cells]
        scores = asking @ coarse.mT * (self.dim // self.heads) ** -0.5
        following = (scores - lse[:, :, early:, None]).exp().sum(1)
        out = torch.cat([out[:, :, :early], joined], 2)
        return self.projection(out.transpose(1, 2).flatten(2)), following.to(tokens.dtype)

    def chosen(self, attention_map: Tensor) -> Tensor:
        """Which fine tokens each of T tokens reads: bool `[B, T, F]` from a map `[B, T, cells]`."""
        low, high = attention_map.amin(2, keepdim=True), attention_map.amax(2, keepdim=True)
        marked = attention_map - low > self.threshold * (high - low)
        image = marked.float().unflatten(2, self.grid)
        regions = nn.functional.adaptive_max_pool2d(image, self.regions)
        size = (self.grid[0] * self.zoom, self.grid[1] * self.zoom)
        return nn.functional.interpolate(regions, size=size, mode="nearest").flatten(2) > 0

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, H, N, D]`."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    @staticmethod
    def _lists(chosen: Tensor) -> Tensor:
        """The chosen ones of bool `[B, T, F]`, ascending: int64 `[B, 1, T, most]`, -1 behind shorter lists."""
        free = torch.compiler.is_compiling() or chosen.is_meta  # shapes may not depend on what was chosen
        most = chosen.shape[2] if free else max(int(chosen.sum(2).max()), 1)
        first = chosen.long().sort(stable=True, dim=2, descending=True)
        return torch.where(first.values > 0, first.indices, -1)[:, None, :, :most]

    def _check(self, tokens: Tensor, fine: Tensor, attention_map: Tensor) -> None:
        """Refuse shapes that do not fit."""
        cells = self.grid[0] * self.grid[1]
        if tokens.ndim != 3 or tokens.shape[2] != self.dim:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: expected [B, N, {self.dim}]")
        expected = (len(tokens), cells * self.zoom**2, self.dim)
        if fine.shape != expected:
            raise ValueError(f"fine of shape {tuple(fine.shape)}: expected {expected}")
        after = tokens.shape[1] - self.before - cells
        if attention_map.ndim != 3 or attention_map.shape[::2] != (len(tokens), cells):
            raise ValueError(
                f"attention_map of shape {tuple(attention_map.shape)}: expected [{len(tokens)}, T, {cells}]"
            )
        if not 1 <= attention_map.shape[1] <= after:
            raise ValueError(
                f"attention_map for {attention_map.shape[1]} tokens: expected 1 .. {after} after the image"
            )

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """One token of text, an image of 2 x 3, five tokens of text, four of which have maps; 4 x 6 fine tokens."""
        shapes = ((batch, 12, 8), (batch, 24, 8), (batch, 4, 6))
        inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        return tuple(x.to(device, dtype) for x in (*inputs[:2], inputs[2].softmax(-1)))
