"""TransNeXt's aggregated attention: fine keys nearby and pooled keys of the whole map share one softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import check_map, on_channels
from saccade.ops import attend, merge
from saccade.types import Kind, Pattern


@register(
    "transnext",
    Kind.LAYER,
    summary="One softmax over a sliding window and the pooled map, of cosine scores scaled by the number of keys.",
    papers=("TransNeXt: Robust Foveal Visual Perception for Vision Transformers",),
    year=2023,
    code="DaiShiResearch/TransNeXt",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N^2",
    deviations=(
        (
            "The attention alone, without dropout: not the convolutional GLU, nor the last stage's plain attention "
            "with the same scores (`reduction` 1 there means no window and no pooling; here pooling by 1)."
        ),
        "Works on any size of map; the authors fix it when the layer is built. At least one pooled key.",
        "Work is N^2 / reduction^2 for the pooled keys, or N with `pooled`; N for the window.",
    ),
    example={"dim": 16, "heads": 2, "reduction": 2, "hidden": 8},
)
class TransNeXt(Layer):
    """(p_near + q' T + t) V_near + p_far V_far, then a projection; [p_near, p_far] = softmax([s_near, s_far]).

    - s = log(keys) softplus(tau) (q' + e) k' + B, with q' and k' of length 1, a temperature tau and a query embedding e
      for each head, and the number of keys that the pixel sees, near and far.
    - near: the pixels of the map in the window around it; B learned for each of its places.
    - far: LayerNorm(AvgPool(GELU(W x))) with the same key and value weights; B = MLP(sign(d) log2(|8 d| + 1) / 3), d
      the offset from the pooled key's centre in units of the map that the weights were trained on.
    - T (learnable tokens) and t give each place of the window a further weight, outside the softmax.

    Near and far are two attentions that are merged through their LSE.

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        window: Side of the window in pixels, odd.
        reduction: Side of the square of pixels that becomes one pooled key.
        pooled: Pooled keys along each axis instead, whatever the size of the map (the authors' linear mode).
        trained_grid: Height and width of the map that offsets are measured by; None means that of each call.
        hidden: Hidden channels of the MLP.
        qkv_bias: Bias of the query, key and value projections.
    """

    def __init__(
        self, dim: int, heads: int = 8, window: int = 3, reduction: int = 8, pooled: int | None = None,
        trained_grid: tuple[int, int] | None = None, hidden: int = 512, qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(window >= 1 and window % 2 == 1, "window", window, "an odd number of pixels")
        require(reduction >= 1, "reduction", reduction, "at least 1 pixel")
        require(pooled is None or pooled >= 1, "pooled", pooled, "None, or at least 1 key")
        known = trained_grid is None or min(trained_grid) >= 1
        require(known, "trained_grid", trained_grid, "None, or a height and a width of at least 1")
        require(hidden >= 1, "hidden", hidden, "at least 1 channel")
        self.dim, self.heads, self.window, self.reduction = dim, heads, window, reduction
        self.pooled, self.trained_grid, depth = pooled, trained_grid, dim // heads
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key_value = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.reduce = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, dim)
        self.offset_bias = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, heads))
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.embedding = nn.Parameter(torch.empty(heads, 1, depth))
        self.place_bias = nn.Parameter(torch.empty(heads, 1, window**2))
        self.tokens = nn.Parameter(torch.empty(heads, depth, window**2))
        self.token_bias = nn.Parameter(torch.zeros(heads, 1, window**2))
        for weight, std in ((self.embedding, 0.02), (self.place_bias, 0.0004), (self.tokens, 0.02)):
            nn.init.trunc_normal_(weight, std=std)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape, any height and width."""
        (x,) = inputs
        check_map(x, self.dim)
        pooled = (self._cells(x.shape[2]), self._cells(x.shape[3]))
        q = nn.functional.normalize(self._split(on_channels(self.query, x)), dim=-1)
        inside = self._near(x.new_ones(1, 1, *x.shape[2:]), 1)[0, 0, ..., 0] > 0  # [N, window^2]
        keys = inside.sum(-1, keepdim=True) + pooled[0] * pooled[1]
        scaled = (q + self.embedding) * nn.functional.softplus(self.temperature) * keys.double().log().to(x.dtype)
        k, v = on_channels(self.key_value, x).chunk(2, 1)
        k = nn.functional.normalize(k.unflatten(1, (self.heads, -1)), dim=2).flatten(1, 2)
        near_v = self._near(v, self.heads)
        scores = (scaled[..., None, :] @ self._near(k, self.heads).mT)[..., 0, :] + self.place_bias
        scores = scores.masked_fill(~inside, -torch.inf)
        near = (scores.softmax(-1)[..., None, :] @ near_v)[..., 0, :]
        far, far_lse = self._far(x, scaled, pooled)
        out = merge([(near, scores.logsumexp(-1).to(far_lse.dtype)), (far, far_lse)]).out
        out = out + ((q @ self.tokens + self.token_bias)[..., None, :] @ near_v)[..., 0, :]
        return on_channels(self.projection, out.mT.flatten(1, 2).unflatten(2, x.shape[2:]))

    def _cells(self, size: int) -> int:
        """Pooled keys along an axis of this many pixels, at most as many."""
        return max(size // self.reduction, 1) if self.pooled is None else min(self.pooled, size)

    def _split(self, x: Tensor) -> Tensor:
        """`[B, C, y, x]` to `[B, H, y * x, D]`."""
        return x.flatten(2).unflatten(1, (self.heads, -1)).mT

    def _near(self, x: Tensor, heads: int) -> Tensor:
        """The window around every pixel, 0 beyond the map: `[B, C, Y, X]` to `[B, heads, N, window^2, C / heads]`."""
        places = nn.functional.unfold(x, self.window, padding=self.window // 2)
        return places.unflatten(1, (heads, -1, self.window**2)).permute(0, 1, 4, 3, 2)

    def _far(self, x: Tensor, scaled: Tensor, pooled: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Attention to the pooled keys, and its LSE."""
        means = nn.functional.adaptive_avg_pool2d(nn.functional.gelu(on_channels(self.reduce, x)), pooled)
        k, v = (self._split(part) for part in on_channels(self.key_value, on_channels(self.norm, means)).chunk(2, 1))
        bias = self._offset_bias(x, pooled)
        out, lse = attend(scaled, nn.functional.normalize(k, dim=-1), v, bias=bias[None], scale=1.0, return_lse=True)
        return out, lse  # type: ignore[return-value]

    def _offset_bias(self, x: Tensor, pooled: tuple[int, int]) -> Tensor:
        """Bias `[H, N, pooled keys]`: the MLP is run once for each offset that occurs, and looked up."""
        grid = (x.shape[2], x.shape[3])
        known = grid if self.trained_grid is None else self.trained_grid
        offsets, indices = zip(
            *(pooled_offsets(*sizes, x.device) for sizes in zip(grid, pooled, strict=True)), strict=True
        )
        rows, columns = (8 * each / max(size - 1, 1) for each, size in zip(offsets, known, strict=True))
        places = torch.stack([rows[:, None].expand(-1, len(columns)), columns.expand(len(rows), -1)], -1)
        table = self.offset_bias((places.sign() * (places.abs() + 1).log2() / 3).to(x.dtype))  # log2(8) = 3
        bias = table[indices[0][:, None, :, None], indices[1][:, None, :]]  # [Y, X, pooled Y, pooled X, H]
        return bias.permute(4, 0, 1, 2, 3).flatten(3).flatten(1, 2)

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 5 x 6 map of 16 channels."""
        return (torch.randn(batch, 16, 5, 6, generator=generator).to(device, dtype),)


def pooled_offsets(size: int, pooled: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Offsets of pixels from the centres of adaptive pooling's cells along one axis, each once.

    Args:
        size: Pixels along the axis.
        pooled: Cells along the axis.
        device: Where to put the result.

    Returns:
        fp64 offsets, ascending, and the number of each pair's, int64 `[size, pooled]`.
    """
    cell = torch.arange(pooled, device=device)
    twice = cell * size // pooled + ((cell + 1) * size + pooled - 1) // pooled - 1  # twice the centre
    ends = [i * size // pooled + -(-(i + 1) * size // pooled) - 1 for i in range(pooled)]
    step = 2 if all((end - ends[0]) % 2 == 0 for end in ends) else 1
    low, high = -max(ends), 2 * (size - 1) - min(ends)
    offsets = torch.arange(low, high + 1, step, device=device, dtype=torch.float64) / 2
    pixel = torch.arange(size, device=device)
    return offsets, (2 * pixel[:, None] - twice - low) // step
