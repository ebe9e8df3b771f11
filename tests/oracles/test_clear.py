"""CLEAR's circles, pair by pair, and dense softmax."""

from __future__ import annotations

import itertools

import pytest
import torch

from saccade.mechanisms.where import _grids, clear
from saccade.mechanisms.where.clear import Clear
from saccade.types import BlockLayout, Geometry, TokenIndex


def oracle_mask(grid, radius, prefix=0, suffix=0):
    places = list(itertools.product(*map(range, grid)))
    total = prefix + len(places) + suffix
    mask = torch.ones(total, total, dtype=torch.bool)
    for i, x in enumerate(places):
        for j, y in enumerate(places):
            mask[prefix + i, prefix + j] = sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) < radius**2
    return mask


def run(mask, mechanism, geometry):
    """The mechanism's output and that of dense attention over True pairs."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, len(mask), 8, dtype=torch.float64)
    k, v = (torch.randn(2, 2, len(mask), 8, dtype=torch.float64) for _ in range(2))
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~mask, -float("inf"))
    return mechanism(q, k, v, geometry=geometry), scores.softmax(-1) @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize("cost", [1e-9, 1e9])  # lists of neighbours, blocks
@pytest.mark.parametrize(
    ("grid", "radius"),
    [((8, 9), 2.0), ((8, 9), 3.0), ((7, 11), 3.5), ((5, 6), 0.5), ((13,), 4.0), ((3, 5, 4), 2.5), ((6, 7), 100.0)],
)
def test_equals_the_circles(grid, radius, cost, monkeypatch):
    monkeypatch.setattr(_grids, "GATHER_COST", cost)
    clear._circles.cache_clear()
    mask = oracle_mask(grid, radius)
    mechanism = Clear(radius, block=8)
    q = torch.zeros(1, 1, len(mask), 4)
    chosen = mechanism.pattern(q, q, Geometry(grid=grid))
    chosen.validate()
    assert isinstance(chosen, TokenIndex if cost < 1 else BlockLayout)
    assert torch.equal(chosen.to_dense()[0, 0], mask)
    torch.testing.assert_close(*run(mask, mechanism, Geometry(grid=grid)), rtol=0, atol=1e-10)
    clear._circles.cache_clear()


@pytest.mark.parametrize(("prefix", "suffix"), [(3, 0), (0, 5), (7, 2)])
def test_text_sees_all_and_is_seen_by_all(prefix, suffix):
    mask = oracle_mask((6, 7), 2.5, prefix, suffix)
    geometry = Geometry(grid=(6, 7), prefix=prefix, suffix=suffix)
    torch.testing.assert_close(*run(mask, Clear(2.5, block=8), geometry), rtol=0, atol=1e-10)


def test_known_circle():
    """Radius 2 is exclusive: the middle of 5 x 5 sees the 3 x 3 places around it."""
    q = torch.zeros(1, 1, 25, 4)
    seen = Clear(2.0, block=5).pattern(q, q, Geometry(grid=(5, 5))).to_dense()[0, 0, 12].int().view(5, 5).tolist()
    assert seen == [[0] * 5, *([0, 1, 1, 1, 0] for _ in range(3)), [0] * 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0.0}, r"radius=0\.0: expected a finite number of tokens above 0"),
        ({"radius": float("inf")}, "radius=inf: expected a finite number"),
        ({"block": 0}, "block=0: expected at least 1 token"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Clear(**settings)
