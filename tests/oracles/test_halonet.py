"""HaloNet's pattern against blocks and halos taken out of a padded map, and dense softmax."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where import _grids, _windows
from saccade.mechanisms.where.halonet import HaloNet
from saccade.types import Geometry


def oracle_mask(height, width, size, halo, prefix=0, suffix=0):
    """A block of queries sees what a window of size + 2 halo, centred on it, cuts out of the map."""
    tokens = height * width
    mask = torch.ones(prefix + tokens + suffix, prefix + tokens + suffix, dtype=torch.bool)
    mask[prefix : prefix + tokens, prefix : prefix + tokens] = False
    rows, columns = -(-height // size), -(-width // size)
    places = torch.full((rows * size + 2 * halo, columns * size + 2 * halo), -1)
    places[halo : halo + height, halo : halo + width] = torch.arange(tokens).view(height, width)
    for top in range(0, rows * size, size):
        for left in range(0, columns * size, size):
            keys = places[top : top + size + 2 * halo, left : left + size + 2 * halo].flatten().tolist()
            queries = places[top + halo : top + halo + size, left + halo : left + halo + size].flatten().tolist()
            for i in queries:
                for j in keys:
                    if min(i, j) >= 0:
                        mask[prefix + i, prefix + j] = True
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
    ("grid", "size", "halo"),
    [((8, 12), 4, 1), ((8, 12), 4, 3), ((9, 6), 3, 5), ((7, 10), 4, 2), ((3, 11), 5, 1), ((6, 6), 2, 0)],
)
def test_equals_blocks_with_halos(grid, size, halo, cost, monkeypatch):
    monkeypatch.setattr(_grids, "GATHER_COST", cost)
    _windows.head_window_patterns.cache_clear()
    mask = oracle_mask(*grid, size, halo)
    mechanism = HaloNet(size, halo, block=8)
    q = torch.zeros(1, 1, len(mask), 4)
    chosen = mechanism.pattern(q, q, Geometry(grid=grid))
    chosen.validate()
    assert torch.equal(chosen.to_dense()[0, 0], mask)
    torch.testing.assert_close(*run(mask, mechanism, Geometry(grid=grid)), rtol=0, atol=1e-10)
    _windows.head_window_patterns.cache_clear()


@pytest.mark.parametrize(("prefix", "suffix"), [(3, 0), (0, 5), (7, 2)])
def test_text_sees_all_and_is_seen_by_all(prefix, suffix):
    mask = oracle_mask(6, 7, 3, 1, prefix, suffix)
    geometry = Geometry(grid=(6, 7), prefix=prefix, suffix=suffix)
    torch.testing.assert_close(*run(mask, HaloNet(3, 1, block=8), geometry), rtol=0, atol=1e-10)


def test_known_halo():
    """Eight places, blocks of two, a halo of one: the block, one place before it and one after."""
    q = torch.zeros(1, 1, 8, 4)
    mask = HaloNet(2, 1, block=2).pattern(q, q).to_dense()[0, 0].int().tolist()
    assert mask[0] == mask[1] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert mask[2] == mask[3] == [0, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size=0: expected an int of at least 1"),
        ({"halo": -1}, "halo=-1: expected an int of at least 0"),
        ({"block": 0}, "block=0: expected at least 1 token"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        HaloNet(**settings)


def test_refuses_halos_for_other_axes():
    q = torch.zeros(1, 1, 36, 4)
    with pytest.raises(ValueError, match=r"halo=\(1, 1, 1\): expected one for each of the 2 axes"):
        HaloNet(3, (1, 1, 1))(q, q, q, geometry=Geometry(grid=(6, 6)))
