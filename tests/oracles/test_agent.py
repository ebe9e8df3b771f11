"""Agent Attention against the paper's equations, written as loops over heads, agents and places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.landmarks.agent import AgentAttention


def sample(map_: Tensor, row: float, column: float) -> Tensor:
    """Bilinear value of a map at a fractional place, edges repeated."""
    height, width = map_.shape
    row, column = min(max(row, 0.0), height - 1.0), min(max(column, 0.0), width - 1.0)
    top, left = int(row), int(column)
    low, right = min(top + 1, height - 1), min(left + 1, width - 1)
    a, b = row - top, column - left
    upper = (1 - b) * map_[top, left] + b * map_[top, right]
    lower = (1 - b) * map_[low, left] + b * map_[low, right]
    return (1 - a) * upper + a * lower


def dense_bias(blocks: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
    heads, agents = blocks.shape[:2]
    bias = torch.empty(heads, agents, *grid, dtype=blocks.dtype)
    for h in range(heads):
        for a in range(agents):
            for i in range(grid[0]):
                for j in range(grid[1]):
                    place = (i + 0.5) * 7 / grid[0] - 0.5, (j + 0.5) * 7 / grid[1] - 0.5
                    bias[h, a, i, j] = sample(blocks[h, a], *place) + rows[h, a, i, 0] + columns[h, a, 0, j]
    return bias.flatten(2)


def pool(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean over the bins [floor(i Y / y), ceil((i + 1) Y / y)) of `[C, Y, X]`, as `[y * x, C]`."""
    height, width = image.shape[1:]
    cells = []
    for i in range(size[0]):
        for j in range(size[1]):
            top, bottom = i * height // size[0], -(-(i + 1) * height // size[0])
            left, right = j * width // size[1], -(-(j + 1) * width // size[1])
            cells.append(image[:, top:bottom, left:right].mean((1, 2)))
    return torch.stack(cells)


def oracle(layer: AgentAttention, x: Tensor) -> Tensor:
    grid, heads, dim = layer.grid, layer.heads, layer.dim
    head_dim = dim // heads
    weights = dict(layer.named_parameters())
    biases = [
        dense_bias(*(weights[f"{name}.{part}"] for part in ("blocks", "rows", "columns")), grid)
        for name in ("gather_bias", "spread_bias")
    ]
    outputs = []
    for tokens in x:
        q, k, v = (tokens @ part.T for part in weights["qkv.weight"].split(dim))
        agents = pool(q.T.reshape(dim, *grid), layer.agents)
        mixed = torch.zeros_like(q)
        for h in range(heads):
            mine = slice(h * head_dim, (h + 1) * head_dim)
            gather = torch.softmax(agents[:, mine] @ k[:, mine].T / head_dim**0.5 + biases[0][h], 1)
            spread = torch.softmax(q[:, mine] @ agents[:, mine].T / head_dim**0.5 + biases[1][h].T, 1)
            mixed[:, mine] = spread @ gather @ v[:, mine]
        image = torch.nn.functional.pad(v.T.reshape(dim, *grid), (1, 1, 1, 1))
        local = weights["depthwise.bias"][:, None, None].expand(dim, *grid).clone()
        for i in range(3):
            for j in range(3):
                tap = weights["depthwise.weight"][:, 0, i, j, None, None]
                local += tap * image[:, i : i + grid[0], j : j + grid[1]]
        mixed = mixed + local.reshape(dim, -1).T
        outputs.append(mixed @ weights["projection.weight"].T + weights["projection.bias"])
    return torch.stack(outputs)


def build(grid: tuple[int, int], heads: int, agents: tuple[int, int], dim: int = 12) -> AgentAttention:
    torch.manual_seed(0)
    layer = AgentAttention(dim, grid, heads, agents).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


@pytest.mark.parametrize(
    ("grid", "heads", "agents"),
    [((6, 6), 3, (2, 2)), ((5, 7), 2, (3, 2)), ((1, 9), 1, (1, 4)), ((16, 3), 4, (16, 3)), ((7, 7), 4, (1, 1))],
)
def test_agent_attention_equals_the_paper(grid: tuple[int, int], heads: int, agents: tuple[int, int]) -> None:
    layer = build(grid, heads, agents)
    x = torch.randn(2, grid[0] * grid[1], 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_one_agent_without_bias_gives_every_token_the_same() -> None:
    """One agent: every query's softmax over agents is 1, so without the convolution all outputs agree."""
    layer = build((4, 4), 2, (1, 1))
    with torch.no_grad():
        layer.depthwise.weight.zero_()
    out = layer(torch.randn(1, 16, 12, dtype=torch.float64))
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, r"heads=5: expected a divisor of dim=12"),
        ({"grid": (0, 4)}, r"grid=\(0, 4\): expected height and width"),
        ({"agents": (5, 2)}, r"agents=\(5, 2\): expected height and width .* grid=\(4, 4\)"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AgentAttention(**{"dim": 12, "grid": (4, 4), "heads": 2, "agents": (2, 2)} | settings)


def test_bad_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x of shape \(1, 15, 12\): expected \[B, 16, 12\]"):
        AgentAttention(12, (4, 4), 2, (2, 2))(torch.zeros(1, 15, 12))
