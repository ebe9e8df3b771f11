"""Swin's pattern against the paper's procedure: roll the map, cut it, and mask what the roll brought together."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where import _grids, _windows
from saccade.mechanisms.where.swin import Swin
from saccade.types import BlockLayout, Geometry, TokenIndex


def dense_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over True pairs, in fp64."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -float("inf")).softmax(-1) @ v


def oracle_mask(height, width, window, shift):
    """Pairs of the cyclic-shift procedure on one map; what had to be padded sees and is seen by nothing."""
    high, wide = -(-height // window) * window, -(-width // window) * window
    places = torch.full((high, wide), -1)
    places[:height, :width] = torch.arange(height * width).view(height, width)
    regions = torch.zeros(high, wide, dtype=torch.long)
    if shift:
        cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for row, rows in enumerate(cuts):
            for column, columns in enumerate(cuts):
                regions[rows, columns] = 3 * row + column
        places = places.roll((-shift, -shift), (0, 1))
    mask = torch.zeros(height * width, height * width, dtype=torch.bool)
    for top in range(0, high, window):
        for left in range(0, wide, window):
            inside = slice(top, top + window), slice(left, left + window)
            members = list(zip(places[inside].flatten().tolist(), regions[inside].flatten().tolist(), strict=True))
            for i, mine in members:
                for j, theirs in members:
                    if min(i, j) >= 0 and mine == theirs:
                        mask[i, j] = True
    return mask


def with_text(mask, prefix, suffix):
    total = prefix + len(mask) + suffix
    full = torch.ones(total, total, dtype=torch.bool)
    full[prefix : total - suffix, prefix : total - suffix] = mask
    return full


def inputs(tokens):
    torch.manual_seed(0)
    q = torch.randn(2, 4, tokens, 8, dtype=torch.float64)
    return q, *(torch.randn(2, 2, tokens, 8, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("cost", [1e-9, 1e9])  # lists of neighbours, blocks
@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((8, 12), 4, 0), ((8, 12), 4, 2), ((9, 6), 3, 1), ((7, 10), 4, 2), ((5, 9), 4, 1), ((11, 5), 3, 2)],
)
def test_equals_the_cyclic_shift(grid, window, shift, cost, monkeypatch):
    monkeypatch.setattr(_grids, "GATHER_COST", cost)
    _windows.head_window_patterns.cache_clear()
    mask = oracle_mask(*grid, window, shift)
    q, k, v = inputs(len(mask))
    mechanism = Swin(window, shift, block=8)
    chosen = mechanism.pattern(q, k, Geometry(grid=grid))
    chosen.validate()
    assert isinstance(chosen, TokenIndex if cost < 1 else BlockLayout)
    assert torch.equal(chosen.to_dense()[0, 0], mask)
    out = mechanism(q, k, v, geometry=Geometry(grid=grid))
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)
    _windows.head_window_patterns.cache_clear()


@pytest.mark.parametrize(("prefix", "suffix"), [(3, 0), (0, 5), (7, 2)])
def test_text_sees_all_and_is_seen_by_all(prefix, suffix):
    mask = with_text(oracle_mask(6, 10, 4, 2), prefix, suffix)
    q, k, v = inputs(len(mask))
    out = Swin(4, 2, block=8)(q, k, v, geometry=Geometry(grid=(6, 10), prefix=prefix, suffix=suffix))
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)


def pairs(grid, **settings):
    q = torch.zeros(1, 1, torch.Size(grid).numel(), 4)
    return Swin(**settings, block=4).pattern(q, q, Geometry(grid=grid)).to_dense()[0, 0]


def test_known_windows():
    """Eight places, windows of four shifted by two: the ends stay apart though the shift is cyclic."""
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4), torch.ones(2, 2)).bool()
    assert torch.equal(pairs((8,), window=4, shift=2), expected)
    assert torch.equal(pairs((1, 8), window=(1, 4), shift=(0, 2)), expected)


def test_an_axis_that_one_window_holds_is_not_shifted():
    assert torch.equal(pairs((3, 8), window=4, shift=2), pairs((3, 8), window=(3, 4), shift=(0, 2)))
    assert bool(pairs((4, 4), window=4, shift=2).all())


def test_three_axes_are_the_product_of_one():
    got = pairs((2, 5, 4), window=(2, 3, 2), shift=(1, 1, 1))
    first, second, third = (pairs((n,), window=w, shift=s).double() for n, w, s in ((2, 2, 0), (5, 3, 1), (4, 2, 1)))
    assert torch.equal(got.double(), torch.kron(torch.kron(first, second), third))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window=0: expected an int of at least 1"),
        ({"window": (2, 2, 2, 2)}, r"window=\(2, 2, 2, 2\): expected an int"),
        ({"shift": -1}, "shift=-1: expected an int of at least 0"),
        ({"block": 0}, "block=0: expected at least 1 token"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Swin(**settings)


@pytest.mark.parametrize(
    ("settings", "geometry", "message"),
    [
        ({"window": 4, "shift": 4}, Geometry(grid=(6, 6)), "shift=4: expected less than window=4"),
        ({"window": (4, 4)}, Geometry(), r"window=\(4, 4\): expected one for each of the 1 axes"),
        ({"shift": (1, 1, 1)}, Geometry(grid=(6, 6)), r"shift=\(1, 1, 1\): expected one for each of the 2 axes"),
        ({}, Geometry(grid=(5, 6)), "tokens=36: expected 30"),
        ({}, Geometry(causal=True), "causal=True"),
    ],
)
def test_refuses_geometry(settings, geometry, message):
    q = torch.zeros(1, 1, 36, 4)
    with pytest.raises(ValueError, match=message):
        Swin(**settings)(q, q, q, geometry=geometry)
