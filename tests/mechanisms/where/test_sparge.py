"""The Hilbert curve of SpargeAttn, and grids reordered along it."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.where._orders import hilbert_order
from saccade.mechanisms.where.sparge import Sparge
from saccade.types import Geometry


@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (4, 4, 4), (8, 8, 8), (7,)])
def test_curve_moves_one_cell_at_a_time(grid: tuple[int, ...]) -> None:
    cells = torch.stack(torch.unravel_index(hilbert_order(grid), grid), 1)
    assert len(cells.unique(dim=0)) == math.prod(grid)
    assert bool((cells.diff(dim=0).abs().sum(1) == 1).all())


@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 6), (1, 9)])
def test_curve_visits_every_cell_of_any_grid(grid: tuple[int, ...]) -> None:
    assert hilbert_order(grid).sort().values.tolist() == list(range(math.prod(grid)))


def test_every_aligned_run_of_the_curve_is_a_square() -> None:
    cells = torch.stack(torch.unravel_index(hilbert_order((16, 16)), (16, 16)), 1)
    for run in cells.split(16):
        assert (run.amax(0) - run.amin(0)).tolist() == [3, 3]


def test_curve_of_four_cells() -> None:
    assert hilbert_order((2, 2)).tolist() in ([0, 1, 3, 2], [0, 2, 3, 1])


@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (3, 0), (2, 5)])
def test_grid_is_reordered_and_put_back(prefix: int, suffix: int) -> None:
    grid, tokens = (4, 8), prefix + 32 + suffix
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, 2, tokens, 8, generator=generator, dtype=torch.float64).cumsum(2) for _ in range(3))
    mechanism = Sparge(cdf=0.4, similarity=0.2, block_q=8, block_k=4)
    geometry = Geometry(grid=grid, prefix=prefix, suffix=suffix)
    order = [*range(prefix), *(prefix + cell for cell in hilbert_order(grid).tolist()), *range(prefix + 32, tokens)]
    moved = [x[:, :, order] for x in (q, k, v)]
    mask = mechanism.pattern(moved[0], moved[1], geometry).to_dense()
    outside = [*range(prefix), *range(prefix + 32, tokens)]
    assert bool(mask[:, :, outside].all())
    assert bool(mask[:, :, :, outside].all())
    assert not bool(mask.all())
    scores = (moved[0] @ moved[1].transpose(-1, -2) / 8**0.5).masked_fill(~mask, -float("inf"))
    out, lse = mechanism(q, k, v, geometry=geometry, return_lse=True)
    torch.testing.assert_close(out[:, :, order], scores.softmax(-1) @ moved[2], atol=1e-10, rtol=0)
    torch.testing.assert_close(lse[:, :, order].double(), scores.logsumexp(-1), atol=1e-4, rtol=0)
    assert torch.equal(mechanism(q, k, v, geometry=geometry), out)


def test_causal_grids_keep_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 32, 8, generator=generator) for _ in range(3))
    mechanism = Sparge(cdf=0.5, similarity=0.0, block_q=8, block_k=4)
    on_grid = mechanism(q, k, v, geometry=Geometry(causal=True, grid=(4, 8)))
    assert torch.equal(on_grid, mechanism(q, k, v, geometry=Geometry(causal=True)))
