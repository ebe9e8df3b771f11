"""Agent Attention: a few agent tokens, pooled from the queries, gather from all keys and hand out to all queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.ops import attend
from saccade.types import Kind, Pattern

BASE = 7
"""Side of the learned block bias that is interpolated to the grid."""


@register(
    "agent",
    Kind.LAYER,
    summary="Softmax attention through agent tokens pooled from the queries, with position biases; linear in N.",
    papers=("Agent Attention: On the Integration of Softmax and Linear Attention",),
    year=2023,
    code="LeapLabTHU/Agent-Attention",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        "The form of the authors' PVT models without spatial reduction: no class token, no dropout.",
        "The training-free AgentSD variant (agents by token merging, shortcut of the values) is not this layer.",
        "Grid and agents need not be square.",
    ),
    example={"dim": 32, "grid": (8, 8), "heads": 4, "agents": (3, 3)},
)
class AgentAttention(Layer):
    """O = softmax(s Q A^T + B2) softmax(s A K^T + B1) V + DWC(V), A = pool(Q), s = D^-0.5, then a projection.

    B1 `[H, n, N]` and B2 `[H, N, n]` bias each of n agents at each grid place: a 7 x 7 map per head and agent,
    interpolated to the grid, plus a row and a column term. DWC is a 3 x 3 depthwise convolution. Cost is N n.

    Args:
        dim: Channels C, in and out.
        grid: Height and width of the token grid; N is their product, tokens row-major.
        heads: H; divides C.
        agents: Height and width of the pooled grid of agents.
        qkv_bias: Bias of the query, key and value projection.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        heads: int = 8,
        agents: tuple[int, int] = (7, 7),
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(len(grid) == 2 and min(grid) >= 1, "grid", grid, "height and width of at least 1")
        fits = len(agents) == 2 and all(1 <= few <= many for few, many in zip(agents, grid, strict=True))
        require(fits, "agents", agents, f"height and width of at least 1 and at most those of grid={grid}")
        self.dim, self.heads = dim, heads
        self.grid, self.agents = (grid[0], grid[1]), (agents[0], agents[1])
        count = agents[0] * agents[1]
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.projection = nn.Linear(dim, dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.gather_bias = PlaceBias(heads, count, self.grid)
        self.spread_bias = PlaceBias(heads, count, self.grid)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to tokens `[B, N, C]`."""
        (x,) = inputs
        places = self.grid[0] * self.grid[1]
        if x.ndim != 3 or x.shape[1:] != (places, self.dim):
            raise ValueError(f"x of shape {tuple(x.shape)}: expected [B, {places}, {self.dim}] for grid={self.grid}")
        q, k, v = self.qkv(x).chunk(3, -1)
        pooled = nn.functional.adaptive_avg_pool2d(self._on_grid(q), self.agents).flatten(2).mT
        q, k, values, agents = (self._split(tokens) for tokens in (q, k, v, pooled))
        gathered = attend(agents, k, values, bias=self.gather_bias())
        out = attend(q, agents, gathered, bias=self.spread_bias().mT).transpose(1, 2).flatten(2)
        return self.projection(out + self.depthwise(self._on_grid(v)).flatten(2).mT)

    def _on_grid(self, tokens: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, C, height, width]`."""
        return tokens.mT.unflatten(2, self.grid)

    def _split(self, tokens: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, H, N, D]`."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """Tokens on the example's 8 x 8 grid."""
        return (torch.randn(batch, 64, 32, generator=generator).to(device, dtype),)


class PlaceBias(nn.Module):
    """Bias `[1, H, n, N]` of n agents at the N places of a grid: an interpolated map, a row term and a column term."""

    def __init__(self, heads: int, agents: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.blocks = nn.Parameter(torch.empty(heads, agents, BASE, BASE))
        self.rows = nn.Parameter(torch.empty(heads, agents, grid[0], 1))
        self.columns = nn.Parameter(torch.empty(heads, agents, 1, grid[1]))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self) -> Tensor:
        """The bias."""
        blocks = nn.functional.interpolate(self.blocks, self.grid, mode="bilinear")
        return (blocks + self.rows + self.columns).flatten(2)[None]
