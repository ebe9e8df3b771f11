"""NSA: compressed keys, the blocks they point to, and a window; three attentions that a gate adds up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, Position, require
from saccade.mechanisms.where._blocks import head_scores, largest
from saccade.mechanisms.where._compressed import attend_blocks, past_windows, windows, windows_of_blocks
from saccade.ops import attend
from saccade.types import Kind, Pattern


@register(
    "nsa",
    Kind.LAYER,
    summary="Gated sum of attention to compressed keys, to the blocks these choose, and to a window; trained natively.",
    other_papers=("Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",),
    year=2025,
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "streaming"}),
    complexity="N^2",
    deviations=(
        (
            "The paper does not say what layers its learned compression has and published no code: here it is one "
            "linear map of a window's keys plus learned places, which begins as their mean."
        ),
        (
            "A selected block's score adds up the strides it shares with each window (the paper's equation 9, whose "
            "indices begin at an unstated place)."
        ),
        "Of `local_blocks` one is the query's own.",
    ),
    example={"dim": 16, "heads": 4, "kv_heads": 2, "kernel": 4, "stride": 2, "block": 4, "topk": 4, "window": 6},
)
class NSA(Layer):
    """o_i = sum over branches c of sigmoid(W_c x_i) Attention(q_i, K_c, V_c), then a projection.

    Each branch has keys and values of its own.

    - *compressed*: windows of `kernel` keys, one every `stride`, each mapped to one key and one value; a query sees the
      windows that lie in its past, with weights p.
    - *selected*: a block's score is the sum of p over the windows that meet it, weighted by the strides in common, and
      over the heads of the group; a query attends to `topk` blocks, among them the first and the last ones.
    - *window*: the last `window` tokens.

    The choice is not differentiated; keys that it compares are trained through the compressed branch.

    Args:
        dim: Channels C, in and out.
        heads: Query heads H.
        kv_heads: Key/value heads G; None means `heads`. The query heads of one share their choice.
        head_dim: D of each head; None means dim / heads.
        kernel: Keys per window, a multiple of `stride` and at most block + stride.
        stride: Keys from one window to the next.
        block: Keys per selected block, a multiple of `stride`.
        topk: Blocks a query attends to, those always kept included.
        init_blocks: First blocks that are always kept.
        local_blocks: Last blocks that are always kept, the query's own included.
        window: Tokens of the window, the query's own included.
        positions: Encodes queries and the keys of every branch (for example RoPE); None leaves them as they are.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 16,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        kernel: int = 32,
        stride: int = 16,
        block: int = 64,
        topk: int = 16,
        init_blocks: int = 1,
        local_blocks: int = 2,
        window: int = 512,
        positions: Position | None = None,
    ) -> None:
        super().__init__()
        require(heads >= 1, "heads", heads, "at least 1")
        groups = heads if kv_heads is None else kv_heads
        require(groups >= 1 and heads % groups == 0, "kv_heads", kv_heads, f"a divisor of heads={heads}")
        size = dim // heads if head_dim is None else head_dim
        require(dim >= 1 and (head_dim is not None or dim % heads == 0), "dim", dim, f"a multiple of heads={heads}")
        require(size >= 1, "head_dim", head_dim, "at least 1 channel")
        require(stride >= 1, "stride", stride, "at least 1 token")
        require(block >= 1 and block % stride == 0, "block", block, f"a positive multiple of stride={stride}")
        fits = stride <= kernel <= block + stride and kernel % stride == 0
        require(fits, "kernel", kernel, f"a multiple of stride={stride} up to {block + stride}")
        require(init_blocks >= 0, "init_blocks", init_blocks, "at least 0 blocks")
        require(local_blocks >= 1, "local_blocks", local_blocks, "at least 1 block, the query's own")
        require(topk >= init_blocks + local_blocks, "topk", topk, "at least init_blocks + local_blocks")
        require(window >= 1, "window", window, "at least 1 token")
        self.dim, self.heads, self.groups = dim, heads, groups
        self.kernel, self.stride, self.block, self.topk = kernel, stride, block, topk
        self.init_blocks, self.local_blocks, self.window = init_blocks, local_blocks, window
        self.positions = positions
        self.query = nn.Linear(dim, heads * size, bias=False)
        self.keys = nn.Linear(dim, 3 * groups * size, bias=False)
        self.values = nn.Linear(dim, 3 * groups * size, bias=False)
        self.gate = nn.Linear(dim, 3 * heads)
        self.compress_key = Compression(kernel, size)
        self.compress_value = Compression(kernel, size)
        self.projection = nn.Linear(heads * size, dim, bias=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to tokens `[B, N, C]`."""
        (x,) = inputs
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected [B, N, {self.dim}]")
        q = self._split(self.query(x), self.heads)
        keys = self._split(self.keys(x), 3 * self.groups)
        if self.positions is not None:
            places = torch.arange(x.shape[1], device=x.device)
            q, keys = self.positions.encode(q, places), self.positions.encode(keys, places)
        k, v = keys.chunk(3, 1), self._split(self.values(x), 3 * self.groups).chunk(3, 1)
        compressed, weights = self._compressed(q, k[0], v[0])
        chosen = self._choose(weights)
        branches = torch.stack(
            [
                compressed,
                attend_blocks(q, k[1], v[1], chosen, self.block, self.topk),
                attend(q, k[2], v[2], causal=True, window=(self.window - 1, 0)),
            ],
            -1,
        )
        gates = self._split(self.gate(x).sigmoid(), self.heads)
        return self.projection((branches * gates[:, :, :, None]).sum(-1).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """`[B, N, heads * D]` to `[B, heads, N, D]`."""
        return x.unflatten(2, (heads, -1)).transpose(1, 2)

    def _compressed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to the compressed keys, 0 where there are none yet, and its weights `[B, H, N, W]`."""
        k, v = (
            compress(windows(x, self.kernel, self.stride))
            for compress, x in ((self.compress_key, k), (self.compress_value, v))
        )
        places = torch.arange(q.shape[2], device=q.device)
        hidden = ~past_windows(places, k.shape[2], self.kernel, self.stride)
        scores = (head_scores(q, k) * q.shape[3] ** -0.5).masked_fill(hidden, torch.finfo(q.dtype).min)
        weights = scores.softmax(-1).masked_fill(hidden, 0.0)
        share = self.heads // self.groups
        return weights @ v.repeat_interleave(share, 1), weights

    def _choose(self, weights: Tensor) -> Tensor:
        """Blocks that each query selects, bool `[B, G, N, blocks]`."""
        weights = weights.detach().unflatten(1, (self.groups, -1)).sum(2)
        tokens = weights.shape[2]
        block = torch.arange(-(-tokens // self.block), device=weights.device)
        met = windows_of_blocks(weights, len(block), self.block, self.kernel, self.stride)
        first = torch.arange(met.shape[-1], device=weights.device) - self.kernel // self.stride + 1
        last = torch.clamp(first + self.kernel // self.stride, max=self.block // self.stride)
        scores = (met * (last - first.clamp(min=0))).sum(-1)
        own = (torch.arange(tokens, device=weights.device) // self.block)[:, None]
        always = (block < self.init_blocks) | (block > own - self.local_blocks)
        scores = scores.masked_fill(always, float("inf")).masked_fill(block > own, -float("inf"))
        return largest(scores, self.topk) & (block <= own)

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """Two dozen tokens and one of the example's channels."""
        return (torch.randn(batch, 25, 16, generator=generator).to(device, dtype),)


class Compression(nn.Module):
    """A window `[..., size, D]` to one vector `[..., D]`: learned places are added, then all is mapped at once."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.02 * torch.randn(size, dim))
        self.map = nn.Linear(size * dim, dim, bias=False)
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(dim).repeat(1, size) / size)

    def forward(self, x: Tensor) -> Tensor:
        """The compressed windows."""
        return self.map((x + self.places).flatten(-2))
