"""Regions of tokens: moving, restoring, means, and the layout between them."""

from __future__ import annotations

import itertools

import pytest
import torch

from saccade.mechanisms.where._regions import Regions, from_cells, regions_layout, tiles
from saccade.types import Geometry

CPU = torch.device("cpu")


def random_regions(heads: int, tokens: int, count: int, seed: int, batch: int = 2) -> Regions:
    labels = torch.randint(0, count, (batch, heads, tokens), generator=torch.Generator().manual_seed(seed))
    return from_cells(labels, count, Geometry())


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1), (1, 1)])
def test_means_and_moving_back(heads: int, groups: int) -> None:
    regions = random_regions(heads, 23, 7, 0)
    x = torch.randn(2, groups, 23, 5, dtype=torch.float64)
    moved = regions.move(x)
    assert torch.equal(regions.restore(moved), x.repeat_interleave(max(heads // groups, 1), 1))
    assert torch.equal(regions.restore(moved[..., 0]), x.repeat_interleave(max(heads // groups, 1), 1)[..., 0])
    means = regions.means(moved)
    for b, h, r in itertools.product(range(2), range(moved.shape[1]), range(7)):
        inside = moved[b, h, regions.labels[b, h % regions.labels.shape[1]] == r]
        wanted = inside.mean(0) if len(inside) else torch.zeros(5, dtype=torch.float64)
        torch.testing.assert_close(means[b, h, r], wanted, rtol=0, atol=1e-12)
    assert regions.sizes.sum() == 2 * heads * 23


@pytest.mark.parametrize("block", [1, 4, 16, 64])
@pytest.mark.parametrize("column_heads", [1, 2, 4])
def test_layout_is_the_choice_spread_over_tokens(block: int, column_heads: int) -> None:
    rows, columns = random_regions(4, 41, 6, 1), random_regions(column_heads, 37, 9, 2)
    chosen = torch.rand(2, 4, 6, 9, generator=torch.Generator().manual_seed(3)) < 0.3
    layout = regions_layout(chosen, rows, columns, block)
    layout.validate()
    columns_of = columns.labels.repeat_interleave(4 // column_heads, 1)
    for b, h in itertools.product(range(2), range(4)):
        wanted = chosen[b, h][rows.labels[b, h]][:, columns_of[b, h]]
        assert torch.equal(layout.to_dense()[b, h], wanted)


def test_tiles_of_a_grid_they_do_not_divide() -> None:
    regions = tiles((3, 5), (2, 3), Geometry(), CPU)
    assert regions.order.tolist() == [[[0, 1, 2, 5, 6, 7, 3, 4, 8, 9, 10, 11, 12, 13, 14]]]
    assert regions.sizes.tolist() == [[[6, 4, 3, 2]]]
    assert regions.text == 0


def test_text_goes_to_the_end() -> None:
    regions = tiles((2, 2), (2, 1), Geometry(grid=(2, 2), prefix=1, suffix=2), CPU)
    assert regions.order.tolist() == [[[1, 3, 2, 4, 0, 5, 6]]]
    assert regions.labels.tolist() == [[[0, 0, 1, 1, 2, 2, 2]]]
    assert (regions.count, regions.text) == (3, 1)
