"""The fastest assignment within a damage: one mechanism per head, few per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from saccade.tune.candidates import DENSE, Candidate

GROUP_SECONDS = 0.01
"""Cost of running one more group of heads in a layer: gathers, planning and small calls."""

LARGEST_GROUPS = 3
"""Mechanisms per layer, dense included."""


@dataclass(frozen=True, eq=False)
class Choices:
    """What each head of each layer could run.

    Args:
        candidates: Index 0 is dense attention.
        seconds: fp64 `[layers, heads, candidates]`, time of a head's attention.
        damage: fp64 `[layers, heads, candidates]`, relative damage to the residual stream; 0 for dense.
    """

    candidates: Sequence[Candidate]
    seconds: Tensor
    damage: Tensor

    def __post_init__(self) -> None:
        if self.candidates[0].mechanism != DENSE:
            raise ValueError(f"candidates[0]={self.candidates[0].label}: expected dense attention")
        expected = (*self.damage.shape[:2], len(self.candidates))
        for name, tensor in (("seconds", self.seconds), ("damage", self.damage)):
            if tensor.shape != expected:
                raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected {expected}")


@dataclass(frozen=True, eq=False)
class Assignment:
    """A candidate per layer and head, and what it should cost.

    Args:
        chosen: int64 `[layers, heads]`, indices into the candidates.
        seconds: Predicted attention time of one prefill.
        damage: Predicted damage, summed.
    """

    chosen: Tensor
    seconds: float
    damage: float


def assign(choices: Choices, price: float) -> Assignment:
    """Minimise seconds + price * damage, exactly, over sets of at most `LARGEST_GROUPS` candidates per layer.

    Dense attention stays wherever a candidate is not faster: a sparse one below its crossover length is never taken.

    Args:
        choices: Times and damages.
        price: Seconds that one unit of damage is worth, at least 0.

    Returns:
        The assignment.

    Raises:
        ValueError: If `price` is negative.
    """
    if not price >= 0:
        raise ValueError(f"price={price}: expected at least 0")
    layers, heads, count = choices.damage.shape
    too_slow = choices.seconds >= choices.seconds[..., :1]
    too_slow[..., 0] = False
    cost = (choices.seconds + price * choices.damage).masked_fill(too_slow, torch.inf)
    groups = _groups(count)
    value, slot = cost[:, :, groups].min(-1)  # [layers, heads, groups]
    used = torch.stack([(slot == number).any(1) for number in range(LARGEST_GROUPS)]).sum(0)
    best = (value.sum(1) + GROUP_SECONDS * used).argmin(-1)
    picked = slot.gather(2, best[:, None, None].expand(layers, heads, 1))[..., 0]
    return evaluate(choices, groups[best].gather(1, picked))


@cache
def _groups(count: int) -> Tensor:
    """All sets of at most `LARGEST_GROUPS` candidates, int64 `[sets, LARGEST_GROUPS]`; short ones repeat a member."""
    sets = [
        group + group[-1:] * (LARGEST_GROUPS - size)
        for size in range(1, LARGEST_GROUPS + 1)
        for group in combinations(range(count), size)
    ]
    return torch.tensor(sets)


def evaluate(choices: Choices, chosen: Tensor) -> Assignment:
    """Predicted time and damage of an assignment `[layers, heads]`."""
    seconds = choices.seconds.gather(2, chosen[..., None]).sum()
    groups = sum(len(layer.unique()) - 1 for layer in chosen)
    damage = choices.damage.gather(2, chosen[..., None]).sum()
    return Assignment(chosen, float(seconds) + GROUP_SECONDS * groups, float(damage))


def frontier(choices: Choices, points: int = 24) -> list[Assignment]:
    """Assignments from the fastest to all-dense, by rising price of damage; neighbours differ."""
    scale = float(choices.seconds[..., 0].sum()) / max(float(choices.damage.sum(1).mean(1).sum()), 1e-12)
    found: list[Assignment] = []
    for price in torch.logspace(-4, 4, points, dtype=torch.float64):
        assignment = assign(choices, scale * float(price))
        if not found or not torch.equal(assignment.chosen, found[-1].chosen):
            found.append(assignment)
    return found


def within(choices: Choices, damage: float, steps: int = 40) -> Assignment:
    """The fastest assignment found whose predicted damage is at most `damage`, by bisecting the price."""
    low, high = -12.0, 12.0
    scale = float(choices.seconds[..., 0].sum())
    best = evaluate(choices, torch.zeros(choices.damage.shape[:2], dtype=torch.int64))
    for _ in range(steps):
        middle = (low + high) / 2
        assignment = assign(choices, scale * 10**middle)
        if assignment.damage <= damage:
            if assignment.seconds < best.seconds:
                best = assignment
            high = middle
        else:
            low = middle
        if high - low < 0.02:
            break
    return best
