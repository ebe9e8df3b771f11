"""Layers that choose learn to recall: their choice beats as many random blocks, or clusters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from saccade.mechanisms.where.routing_attention import RoutingAttention
from saccade.mechanisms.where.ssa import SSA

TOKENS, NAME, LABELS, WIDTH = 33, 24, 4, 32


class RandomBlocks(SSA):
    """The same layer, whose blocks before a query's own are drawn."""

    def _choose(self, q: Tensor, k: Tensor) -> Tensor:
        blocks = -(-q.shape[2] // self.block)
        block, own = torch.arange(blocks), (torch.arange(q.shape[2]) // self.block)[:, None]
        drawn = torch.rand(q.shape[0], self.groups, q.shape[2], blocks)
        rank = drawn.masked_fill(block == own, 2.0).masked_fill(block > own, -1.0).argsort(-1, descending=True)
        return (rank.argsort(-1) < self.topk) & (block <= own)


class RandomClusters(RoutingAttention):
    """The same layer, whose clusters take tokens that are drawn."""

    def _members(self, x: Tensor) -> Tensor:
        drawn = torch.rand(*x.shape[:2], self.centroids.shape[1], x.shape[2])
        return drawn.topk(min(self.window, x.shape[2]), -1).indices.sort(-1).values


def recall_task(names: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens with a name and a label in random order; the last one has a name and asks for its label."""
    order = torch.rand(count, TOKENS - 1, generator=generator).argsort(1)
    labels = torch.randint(LABELS, (count, TOKENS - 1), generator=generator)
    asked = torch.randint(TOKENS - 1, (count,), generator=generator)
    item = torch.arange(count)
    x = torch.zeros(count, TOKENS, NAME + LABELS + 1)
    x[:, :-1, :NAME] = names[order]
    x[:, :-1, NAME:-1] = nn.functional.one_hot(labels, LABELS).float()
    x[:, -1, :NAME] = names[order[item, asked]]
    x[:, -1, -1] = 1.0
    return x, labels[item, asked]


def trained_accuracy(
    layer: nn.Module, step: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]], steps: int = 350
) -> float:
    """Trained with `step(tokens, generator) -> output, loss to add`; judged by its plain call on new sequences."""
    generator = torch.Generator().manual_seed(0)
    names = torch.randn(TOKENS - 1, NAME, generator=generator) * 2 / NAME**0.5
    first, last = nn.Linear(NAME + LABELS + 1, WIDTH), nn.Linear(WIDTH, LABELS)
    optimizer = torch.optim.Adam([p for part in (first, last, layer) for p in part.parameters()], lr=1e-2)
    for _ in range(steps):
        x, label = recall_task(names, 48, generator)
        hidden = first(x)
        out, extra = step(hidden, generator)
        loss = nn.functional.cross_entropy(last((hidden + out)[:, -1]), label) + extra
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        x, label = recall_task(names, 512, torch.Generator().manual_seed(9))
        hidden = first(x)
        return float((last((hidden + layer(hidden))[:, -1]).argmax(-1) == label).float().mean())


@pytest.mark.slow
def test_the_choice_of_ssa_beats_random_blocks() -> None:
    """Trained as the paper does, a mode drawn for each step, and judged in sparse mode."""
    accuracies = []
    for kind in (SSA, RandomBlocks):
        torch.manual_seed(0)
        layer = kind(WIDTH, heads=1, block=2, topk=4)

        def step(hidden: Tensor, generator: torch.Generator, layer: SSA = layer) -> tuple[Tensor, Tensor]:
            return layer.aligned(hidden, "full" if torch.rand((), generator=generator) < 0.5 else "sparse")

        accuracies.append(trained_accuracy(layer, step))
    chosen, drawn = accuracies
    assert chosen > drawn + 0.25


@pytest.mark.slow
def test_learned_clusters_beat_random_ones() -> None:
    accuracies = []
    for kind in (RoutingAttention, RandomClusters):
        torch.manual_seed(0)
        layer = kind(WIDTH, heads=2, local_heads=0, clusters=4, window=9, shared=False, decay=0.99, scale=0.25)

        def step(hidden: Tensor, _: torch.Generator, layer: RoutingAttention = layer) -> tuple[Tensor, Tensor]:
            out, distance = layer.with_loss(hidden)
            return out, 1e-4 * distance

        accuracies.append(trained_accuracy(layer, step, steps=500))
    chosen, drawn = accuracies
    assert chosen > drawn + 0.25, accuracies
