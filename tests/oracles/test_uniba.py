"""Unidirectional block attention against lists of blocks, dense softmax, and an image computed block by block."""

from __future__ import annotations

import itertools

import pytest
import torch

from saccade.mechanisms.where import _grids, uniba
from saccade.mechanisms.where.uniba import UniBA
from saccade.types import Geometry


def oracle_mask(grid, side, step=-1, prefix=0, suffix=0):
    """Blocks that lie 0 or `step` blocks away along each axis."""
    tokens = list(itertools.product(*map(range, grid)))
    mask = torch.ones(prefix + len(tokens) + suffix, prefix + len(tokens) + suffix, dtype=torch.bool)
    blocks = [tuple(x // side for x in token) for token in tokens]
    for i, mine in enumerate(blocks):
        seen = set(itertools.product(*((b, b + step) for b in mine)))
        for j, other in enumerate(blocks):
            mask[prefix + i, prefix + j] = other in seen
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
    ("grid", "side"), [((8, 12), 4), ((9, 7), 3), ((5, 5), 2), ((3, 11), 5), ((4, 3, 5), 2), ((13,), 4)]
)
@pytest.mark.parametrize(("direction", "step"), [("lt", -1), ("rb", 1)])
def test_equals_blocks_and_those_before(grid, side, direction, step, cost, monkeypatch):
    monkeypatch.setattr(_grids, "GATHER_COST", cost)
    uniba._pattern.cache_clear()
    mask = oracle_mask(grid, side, step)
    mechanism = UniBA(side, direction, block=8)
    q = torch.zeros(1, 1, len(mask), 4)
    chosen = mechanism.pattern(q, q, Geometry(grid=grid))
    chosen.validate()
    assert torch.equal(chosen.to_dense()[0, 0], mask)
    torch.testing.assert_close(*run(mask, mechanism, Geometry(grid=grid)), rtol=0, atol=1e-10)
    uniba._pattern.cache_clear()


@pytest.mark.parametrize(("prefix", "suffix"), [(3, 0), (0, 5), (7, 2)])
def test_text_sees_all_and_is_seen_by_all(prefix, suffix):
    mask = oracle_mask((6, 7), 3, -1, prefix, suffix)
    geometry = Geometry(grid=(6, 7), prefix=prefix, suffix=suffix)
    torch.testing.assert_close(*run(mask, UniBA(3, block=8), geometry), rtol=0, atol=1e-10)


def test_known_blocks():
    """Six places in blocks of two."""
    q = torch.zeros(1, 1, 6, 4)
    mask = UniBA(2, block=2).pattern(q, q).to_dense()[0, 0].int().tolist()
    assert mask[1] == [1, 1, 0, 0, 0, 0]
    assert mask[2] == [1, 1, 1, 1, 0, 0]
    assert mask[5] == [0, 0, 1, 1, 1, 1]


def test_blocks_in_raster_order_need_one_row_of_blocks():
    """Two layers, each block computed from keys and values of at most one row of blocks and one more."""
    torch.manual_seed(0)
    side, down, right = 2, 3, 4
    grid = (side * down, side * right)
    first = torch.randn(1, 1, grid[0] * grid[1], 4, dtype=torch.float64)
    mechanism = UniBA(side, block=4)
    hidden = mechanism(first, first, first, geometry=Geometry(grid=grid))
    whole = mechanism(hidden, hidden, hidden, geometry=Geometry(grid=grid))

    def attend(x, seen):
        keys = torch.cat(seen)
        return torch.softmax(x @ keys.T / 2, -1) @ keys

    tiles = first.view(down, side, right, side, 4).transpose(1, 2).flatten(2, 3)
    kept, done = [{}, {}], {}
    for i, j in itertools.product(range(down), range(right)):
        x = tiles[i, j]
        for cache in kept:
            cache[i, j] = x
            x = attend(x, [cache[at] for at in ((i, j), (i - 1, j - 1), (i - 1, j), (i, j - 1)) if at in cache])
            cache.pop((i - 1, j - 1), None)
            assert len(cache) <= right + 1
        for cache in kept:
            if j == right - 1:
                cache.pop((i - 1, j), None)
        done[i, j] = x
    joined = torch.stack([done[at] for at in itertools.product(range(down), range(right))])
    joined = joined.view(down, right, side, side, 4).transpose(1, 2).reshape(-1, 4)
    torch.testing.assert_close(joined, whole[0, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size=0: expected an int of at least 1"),
        ({"direction": "up"}, "direction='up': expected 'lt' or 'rb'"),
        ({"block": 0}, "block=0: expected at least 1 token"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        UniBA(**settings)


def test_refuses_blocks_for_other_axes():
    q = torch.zeros(1, 1, 36, 4)
    with pytest.raises(ValueError, match=r"size=\(3, 3, 3\): expected one for each of the 2 axes"):
        UniBA((3, 3, 3))(q, q, q, geometry=Geometry(grid=(6, 6)))
