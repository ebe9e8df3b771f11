"""Learned choices train: Sparsifiner's keys against as many random ones, VSA's windows against fixed ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from saccade.mechanisms.where.sparsifiner import Sparsifiner
from saccade.mechanisms.where.vsa import VSA

ITEMS, NAME, LABELS, WIDTH = 16, 16, 4, 32


class RandomKeys(Sparsifiner):
    """The same layer, whose keys are drawn."""

    def connectivity(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.rand(*q.shape[:3], k.shape[2]).argsort(-1)[..., : self.budget]


def recall_task(names: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens with a name and a label in random order; the last one has a name and asks for its label."""
    order = torch.rand(count, ITEMS, generator=generator).argsort(1)
    labels = torch.randint(LABELS, (count, ITEMS), generator=generator)
    asked, item = torch.randint(ITEMS, (count,), generator=generator), torch.arange(count)
    x = torch.zeros(count, ITEMS + 1, NAME + LABELS + 1)
    x[:, :-1, :NAME] = names[order]
    x[:, :-1, NAME:-1] = nn.functional.one_hot(labels, LABELS).float()
    x[:, -1, :NAME] = names[order[item, asked]]
    x[:, -1, -1] = 1.0
    return x, labels[item, asked]


def recall_accuracy(layer: Sparsifiner, dense_steps: int, sparse_steps: int) -> float:
    """Trained in the paper's two stages, full attention that the predictor learns from and then its choice."""
    generator = torch.Generator().manual_seed(0)
    names = torch.randn(ITEMS, NAME, generator=generator) * 2 / NAME**0.5
    first, last = nn.Linear(NAME + LABELS + 1, WIDTH), nn.Linear(WIDTH, LABELS)
    optimizer = torch.optim.Adam([p for part in (first, last, layer) for p in part.parameters()], lr=5e-3)
    budget = layer.budget
    for step in range(dense_steps + sparse_steps):
        layer.budget = layer.count if step < dense_steps else budget
        x, label = recall_task(names, 48, generator)
        hidden = first(x)
        loss = nn.functional.cross_entropy(last((hidden + layer(hidden))[:, -1]), label)
        loss = loss + 0.1 * layer.reconstruction_loss(hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, label = recall_task(names, 512, torch.Generator().manual_seed(9))
        hidden = first(x)
        return float((last((hidden + layer(hidden))[:, -1]).argmax(-1) == label).float().mean())


@pytest.mark.slow
def test_learned_connectivity_beats_random_keys() -> None:
    accuracies = []
    for kind in (Sparsifiner, RandomKeys):
        torch.manual_seed(0)
        layer = kind(WIDTH, ITEMS + 1, heads=1, keep=0.25, reduce_tokens=1, coefficients=4, class_tokens=0)
        accuracies.append(recall_accuracy(layer, dense_steps=400, sparse_steps=100))
    chosen, drawn = accuracies
    assert chosen > drawn + 0.4


def shifted_error(layer: VSA, steps: int) -> float:
    """Trained to show each pixel what lies four pixels to its right; the error on new maps of smooth waves."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(12.0)

    def waves(count: int) -> Tensor:
        shape = (count, 8, 1, 1)
        down, right, phase = (torch.rand(shape, generator=generator) for _ in range(3))
        angle = (down - 0.5) * place[:8, None] * 0.8 + (right - 0.5) * place * 1.6 + 2 * math.pi * phase
        return angle.sin()

    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)

    def error(x: Tensor) -> Tensor:
        return (layer(x)[..., :8] - x[..., 4:]).square().mean()

    for _ in range(steps):
        optimizer.zero_grad()
        error(waves(16)).backward()
        optimizer.step()
    with torch.no_grad():
        return float(error(waves(64)))


@pytest.mark.slow
def test_learned_windows_beat_fixed_ones() -> None:
    errors = []
    for learned in (True, False):
        torch.manual_seed(0)
        layer = VSA(8, heads=2, window=4)
        for part in (layer.offset, layer.scale):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
            part.requires_grad_(learned)
        errors.append(shifted_error(layer, steps=300))
    moved, fixed = errors
    assert moved < 0.2 * fixed
