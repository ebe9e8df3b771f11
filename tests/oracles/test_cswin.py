"""CSWin's pattern against stripes cut out of a map as the authors do, and dense softmax."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where import _grids, _windows
from saccade.mechanisms.where.cswin import CSWin
from saccade.types import Geometry


def stripes(height, width, high, wide):
    """Pairs inside windows of high x wide; what has to be padded is shared between both ends."""
    below, right = -height % high, -width % wide
    places = torch.full((height + below, width + right), -1)
    top, left = below // 2, right // 2
    places[top : top + height, left : left + width] = torch.arange(height * width).view(height, width)
    mask = torch.zeros(height * width, height * width, dtype=torch.bool)
    for window in places.unfold(0, high, high).unfold(1, wide, wide).flatten(0, 1).flatten(1).tolist():
        for i in window:
            for j in window:
                if min(i, j) >= 0:
                    mask[i, j] = True
    return mask


def oracle_mask(height, width, stripe, heads, prefix=0, suffix=0):
    """`[heads, N, N]`: the first half sees vertical stripes, the second horizontal ones."""
    vertical, horizontal = stripes(height, width, height, stripe), stripes(height, width, stripe, width)
    total = prefix + height * width + suffix
    mask = torch.ones(heads, total, total, dtype=torch.bool)
    mask[: heads // 2, prefix : total - suffix, prefix : total - suffix] = vertical
    mask[heads // 2 :, prefix : total - suffix, prefix : total - suffix] = horizontal
    return mask


def run(mask, mechanism, geometry, groups):
    """The mechanism's output and that of dense attention over True pairs."""
    torch.manual_seed(0)
    heads, tokens = mask.shape[:2]
    q = torch.randn(2, heads, tokens, 8, dtype=torch.float64)
    k, v = (torch.randn(2, groups, tokens, 8, dtype=torch.float64) for _ in range(2))
    share = heads // groups
    scores = (q @ k.repeat_interleave(share, 1).mT / 8**0.5).masked_fill(~mask, -float("inf"))
    return mechanism(q, k, v, geometry=geometry), scores.softmax(-1) @ v.repeat_interleave(share, 1)


@pytest.mark.parametrize("cost", [1e-9, 1e9])  # lists of neighbours, blocks
@pytest.mark.parametrize(
    ("grid", "stripe", "heads", "groups"),
    [((6, 6), 1, 2, 2), ((8, 12), 2, 4, 2), ((7, 10), 3, 2, 1), ((9, 5), 4, 6, 6), ((6, 13), 5, 4, 4)],
)
def test_equals_the_stripes(grid, stripe, heads, groups, cost, monkeypatch):
    monkeypatch.setattr(_grids, "GATHER_COST", cost)
    _windows.head_window_patterns.cache_clear()
    mask = oracle_mask(*grid, stripe, heads)
    mechanism = CSWin(stripe, block=8)
    q = torch.zeros(1, heads, mask.shape[1], 4)
    chosen = mechanism.pattern(q, q, Geometry(grid=grid))
    chosen.validate()
    assert torch.equal(chosen.to_dense()[0], mask)
    torch.testing.assert_close(*run(mask, mechanism, Geometry(grid=grid), groups), rtol=0, atol=1e-10)
    _windows.head_window_patterns.cache_clear()


@pytest.mark.parametrize(("prefix", "suffix"), [(3, 0), (0, 5), (7, 2)])
def test_text_sees_all_and_is_seen_by_all(prefix, suffix):
    mask = oracle_mask(6, 7, 2, 4, prefix, suffix)
    geometry = Geometry(grid=(6, 7), prefix=prefix, suffix=suffix)
    torch.testing.assert_close(*run(mask, CSWin(2, block=8), geometry, 4), rtol=0, atol=1e-10)


def test_known_cross():
    """Stripes of one: a token sees its column in the first head and its row in the second."""
    q = torch.zeros(1, 2, 9, 4)
    column, row = CSWin(1, block=3).pattern(q, q, Geometry(grid=(3, 3))).to_dense()[0, :, 4].int().tolist()
    assert column == [0, 1, 0] * 3
    assert row == [0, 0, 0, 1, 1, 1, 0, 0, 0]


def test_a_stripe_as_wide_as_the_image_is_dense_for_any_number_of_heads():
    q = torch.zeros(1, 3, 49, 4)
    assert bool(CSWin(7, block=8).pattern(q, q, Geometry(grid=(7, 7))).to_dense().all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"stripe": 0}, "stripe=0: expected at least 1 token"), ({"block": 0}, "block=0: expected at least 1 token")],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CSWin(**settings)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((6, 6), "heads=3: expected an even number"),
        ((2, 3, 6), r"geometry\.grid=\(2, 3, 6\): expected one or two axes"),
    ],
)
def test_refuses_geometry(grid, message):
    q = torch.zeros(1, 3, 36, 4)
    with pytest.raises(ValueError, match=message):
        CSWin(2)(q, q, q, geometry=Geometry(grid=grid))
