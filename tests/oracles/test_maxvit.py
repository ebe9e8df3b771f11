"""MaxViT's patterns against the paper's reshapes of the map, and dense softmax."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where import _grids, _windows
from saccade.mechanisms.where.maxvit import MaxViT
from saccade.types import Geometry


def groups(height, width, size, form):
    """Lists of token numbers that attend to each other: the authors' partitions of a map padded with -1."""
    rows, columns = -(-height // size), -(-width // size)
    places = torch.full((rows * size, columns * size), -1)
    places[:height, :width] = torch.arange(height * width).view(height, width)
    if form == "block":
        cut = places.view(rows, size, columns, size).permute(0, 2, 1, 3)
    else:
        cut = places.view(size, rows, size, columns).permute(1, 3, 0, 2)
    return cut.reshape(-1, size * size).tolist()


def oracle_mask(height, width, size, form, prefix=0, suffix=0):
    tokens = height * width
    mask = torch.ones(prefix + tokens + suffix, prefix + tokens + suffix, dtype=torch.bool)
    mask[prefix : prefix + tokens, prefix : prefix + tokens] = False
    for group in groups(height, width, size, form):
        for i in group:
            for j in group:
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
@pytest.mark.parametrize("form", ["block", "grid"])
@pytest.mark.parametrize(("grid", "size"), [((8, 12), 4), ((9, 6), 3), ((7, 10), 4), ((3, 11), 5), ((1, 13), 4)])
def test_equals_the_partition(grid, size, form, cost, monkeypatch):
    monkeypatch.setattr(_grids, "GATHER_COST", cost)
    _windows.head_window_patterns.cache_clear()
    mask = oracle_mask(*grid, size, form)
    mechanism = MaxViT(size, form, block=8)
    q = torch.zeros(1, 1, len(mask), 4)
    chosen = mechanism.pattern(q, q, Geometry(grid=grid))
    chosen.validate()
    assert torch.equal(chosen.to_dense()[0, 0], mask)
    torch.testing.assert_close(*run(mask, mechanism, Geometry(grid=grid)), rtol=0, atol=1e-10)
    _windows.head_window_patterns.cache_clear()


@pytest.mark.parametrize("form", ["block", "grid"])
@pytest.mark.parametrize(("prefix", "suffix"), [(3, 0), (0, 5), (7, 2)])
def test_text_sees_all_and_is_seen_by_all(prefix, suffix, form):
    mask = oracle_mask(6, 7, 3, form, prefix, suffix)
    geometry = Geometry(grid=(6, 7), prefix=prefix, suffix=suffix)
    torch.testing.assert_close(*run(mask, MaxViT(3, form, block=8), geometry), rtol=0, atol=1e-10)


def test_known_groups():
    """Six places in groups of three: neighbours, or every second one."""
    q = torch.zeros(1, 1, 6, 4)
    block, grid = (MaxViT(3, form, block=2).pattern(q, q).to_dense()[0, 0].int().tolist() for form in ("block", "grid"))
    assert block[1] == [1, 1, 1, 0, 0, 0]
    assert grid[1] == [0, 1, 0, 1, 0, 1]


def test_both_forms_cost_the_same_and_two_layers_reach_everything():
    q = torch.zeros(1, 1, 256, 4)
    block, grid = (
        MaxViT(4, form).pattern(q, q, Geometry(grid=(16, 16))).to_dense()[0, 0].double() for form in ("block", "grid")
    )
    assert bool((block.sum(1) == 16).all())
    assert bool((grid.sum(1) == 16).all())
    assert bool((block @ grid > 0).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size=0: expected an int of at least 1"),
        ({"form": "stripe"}, "form='stripe': expected 'block' or 'grid'"),
        ({"block": 0}, "block=0: expected at least 1 token"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MaxViT(**settings)


def test_refuses_sizes_for_other_axes():
    q = torch.zeros(1, 1, 36, 4)
    with pytest.raises(ValueError, match=r"size=\(3, 3, 3\): expected one for each of the 2 axes"):
        MaxViT((3, 3, 3))(q, q, q, geometry=Geometry(grid=(6, 6)))
