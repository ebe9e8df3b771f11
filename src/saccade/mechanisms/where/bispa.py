"""SeNER's BiSPA: spans of a text, kept in a band around its diagonal, attend along their rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.ops import attend
from saccade.types import Kind, Pattern


@register(
    "bispa",
    Kind.LAYER,
    summary="Spans (i, j) with |i - j| <= window attend to those of the same start and of the same end.",
    papers=("Small Language Model Makes an Effective Long Text Extractor",),
    year=2025,
    code="THUDM/scholar-profiling",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        "The attention alone: no norms, dropout, convolutions or clamping. SeNER's encoder attention is `arrow`.",
        (
            "A span gets what attention along its own column gives it. The authors' code does not turn the columns "
            "back, so that span (i, j) gets what belongs to (j, i); that is the setting `mirrored`."
        ),
        "Places of the band outside the text are 0 in the output.",
    ),
    example={"dim": 4, "window": 2},
)
class BiSPA(Layer):
    """out = W [Attn_h(x + e) ; Attn_v(x + e)] + b, one head, queries and keys rotated by their place (RoPE).

    Attn_h attends among the spans (i, .) of the same start, Attn_v among those (., j) of the same end, both within the
    band; e is one learned vector for spans with j >= i and one for the others.

    Args:
        dim: Channels C, in and out; even.
        window: Longest distance |i - j| of the spans that are kept.
        mirrored: Span (i, j) gets the output of Attn_v for (j, i), as in the authors' code.
    """

    def __init__(self, dim: int, window: int = 128, mirrored: bool = False) -> None:
        super().__init__()
        require(dim >= 2 and dim % 2 == 0, "dim", dim, "an even number of channels, at least 2")
        require(window >= 0, "window", window, "at least 0")
        self.dim, self.window, self.mirrored = dim, window, mirrored
        self.triangle = nn.Embedding(2, dim)
        self.rows = nn.Linear(dim, 3 * dim)
        self.columns = nn.Linear(dim, 3 * dim)
        self.dense = nn.Linear(2 * dim, dim)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Spans `[B, C, 2 window + 1, N]` to the same shape: place (o, i) holds span (i, i + o - window)."""
        (x,) = inputs
        band, length = 2 * self.window + 1, x.shape[-1]
        if x.ndim != 4 or x.shape[1:3] != (self.dim, band):
            raise ValueError(f"x of shape {tuple(x.shape)}: expected spans [B, {self.dim}, {band}, N]")
        offset = torch.arange(-self.window, self.window + 1, device=x.device)[:, None]
        end = torch.arange(length, device=x.device) + offset
        inside = (end >= 0) & (end < length)
        # Span (i, j) lies at (o, i), and as part of column j at (2 window - o, j): one map, which is its own inverse.
        turn = (self.window - offset) * length + end.clamp(0, length - 1)
        x = x + self.triangle((offset[:, 0] >= 0).long()).mT[..., None]
        across = self._attend(self.rows, x, inside)
        down = self._attend(self.columns, _turned(x, turn), inside)
        out = self.dense(torch.cat([across, down if self.mirrored else _turned(down, turn)], 1).movedim(1, -1))
        return out.movedim(-1, 1).masked_fill(~inside, 0.0)

    def _attend(self, projection: nn.Linear, x: Tensor, inside: Tensor) -> Tensor:
        """Attention along the band, for every place of the text: `[B, C, band, N]` to the same shape."""
        lines = x.permute(0, 3, 2, 1).flatten(0, 1)[:, None]  # [B * N, 1, band, C]
        q, k, v = projection(lines).chunk(3, -1)
        ids = (inside.mT.long() - 1).repeat(len(x), 1)
        out = attend(_rotated(q), _rotated(k), v, q_segments=ids, kv_segments=ids)
        return out[:, 0].unflatten(0, (-1, x.shape[3])).permute(0, 3, 2, 1)

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """Seven tokens' spans of up to 3 tokens, in both directions."""
        return (torch.randn(batch, 4, 5, 7, generator=generator).to(device, dtype),)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """`[B, C, band, N]` with the place `turn` `[band, N]` of the input at each place."""
    return x.flatten(2)[..., turn.flatten()].unflatten(2, turn.shape)


def _rotated(x: Tensor) -> Tensor:
    """RoPE on neighbouring channels: pair m of place p is turned by p / 10000^(2 m / C)."""
    places, channels = x.shape[-2:]
    rate = 10000.0 ** (-torch.arange(0, channels, 2, device=x.device, dtype=x.dtype) / channels)
    angle = torch.arange(places, device=x.device, dtype=x.dtype)[:, None] * rate
    even, odd = x[..., 0::2], x[..., 1::2]
    sin, cos = angle.sin(), angle.cos()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
