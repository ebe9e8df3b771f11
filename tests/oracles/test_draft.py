"""DraftAttention against its formula, tile by tile and pair by pair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from saccade.mechanisms.where.draft import Draft
from saccade.types import Geometry


def tokens_of_tiles(grid: tuple[int, ...], tile: tuple[int, int]) -> list[list[int]]:
    """Places of the tokens of every tile of every frame, in the grid."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, x in enumerate(itertools.product(*map(range, grid))):
        key = (place // math.prod(tile),) if len(grid) == 1 else (*x[:-2], x[-2] // tile[0], x[-1] // tile[1])
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def oracle_mask(q: torch.Tensor, k: torch.Tensor, mechanism: Draft, geometry: Geometry) -> torch.Tensor:
    """The authors' rule: the map's smallest (1 - density) n entries give the threshold; bool `[B, H, N, N]`."""
    batch, heads, total, dim = q.shape
    grid = (total,) if geometry.grid is None else geometry.grid
    groups = [[geometry.prefix + p for p in tile] for tile in tokens_of_tiles(grid, mechanism.tile)]
    mask = torch.ones(batch, heads, total, total, dtype=torch.bool)
    for b, h in itertools.product(range(batch), range(heads)):
        keys = k[b, h * k.shape[1] // heads]
        draft = torch.stack([
            torch.stack([q[b, h, i].mean(0) @ keys[j].mean(0) / math.sqrt(dim) for j in groups]).softmax(0)
            for i in groups
        ])  # fmt: skip
        dropped = int((1 - mechanism.density) * draft.numel())
        threshold = draft.flatten().sort().values[dropped - 1] if dropped else -1.0
        for (r, i), (c, j) in itertools.product(enumerate(groups), enumerate(groups)):
            if not (draft[r, c] >= threshold or draft[r, c] == draft[r].max()):
                mask[b, h, torch.tensor(i)[:, None], torch.tensor(j)] = False
    return mask


def attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over True pairs."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -float("inf")).softmax(-1) @ v


def inputs(tokens: int, heads: int = 2, groups: int = 1, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, n, tokens, 8) for n in (heads, groups, groups))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).cumsum(2) / 3 for shape in shapes]


GEOMETRIES = [
    Geometry(grid=(2, 8, 8)),
    Geometry(grid=(3, 7, 6), prefix=3),
    Geometry(grid=(9, 10), suffix=5),
    Geometry(grid=(2, 5, 9), prefix=2, suffix=7),
    Geometry(grid=(70,)),
    Geometry(),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("settings", [{"density": 0.2}, {"density": 0.5, "tile": (3, 2)}, {"density": 1.0}], ids=str)
def test_output_is_that_of_the_formula(settings: dict, geometry: Geometry) -> None:
    tokens = 61 if geometry.grid is None else geometry.grid_tokens + geometry.prefix + geometry.suffix
    q, k, v = inputs(tokens)
    mechanism = Draft(**{"tile": (4, 4), "block": 8, **settings})
    mask = oracle_mask(q, k, mechanism, geometry)
    layout = mechanism.pattern(q, k, geometry)
    layout.validate()
    assert layout.density() == pytest.approx(float(mask.double().mean()), abs=1e-12)
    out = mechanism(q, k, v, geometry=geometry)
    torch.testing.assert_close(out, attention(q, k, v, mask), rtol=0, atol=1e-10)


def test_known_by_hand() -> None:
    """A frame of 2 x 8 in four tiles: tile t of keys points in direction t, every query in direction 2, a bit in 1.

    Of the 16 entries 12 are below the threshold or on it; the four that tie with it are kept too, as the authors do.
    """
    directions = 8 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    k = directions.repeat_interleave(2, 0).repeat(2, 1)[None, None]
    q = (directions[2] + 0.1 * directions[1]).expand(1, 1, 16, 2)
    plan = Draft(tile=(2, 2), density=0.25, block=4).plan(q, k, Geometry(grid=(2, 8)))
    assert plan.rows.order[0, 0, :8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]
    assert plan.layout.block_mask()[0, 0].tolist() == [[False, True, True, False]] * 4


def test_better_than_random_tiles() -> None:
    """On a smooth field, kept tiles err less than as many random ones."""
    generator = torch.Generator().manual_seed(0)
    place = torch.stack(torch.meshgrid(*(torch.linspace(0, 3, 16),) * 2, indexing="ij"), -1).view(256, 2)
    field = torch.cat([place.sin(), place.cos()], -1) @ torch.randn(4, 16, generator=generator) * 2
    q, k = (field + 0.3 * torch.randn(1, 2, 256, 16, generator=generator) for _ in range(2))
    v = torch.randn(1, 2, 256, 16, generator=generator) + field
    exact = attention(q, k, v, torch.ones(256, 256, dtype=torch.bool))
    mechanism, geometry = Draft(tile=(4, 4), density=0.2, block=16), Geometry(grid=(16, 16))
    error = float((mechanism(q, k, v, geometry=geometry) - exact).norm())
    kept = mechanism.pattern(q, k, geometry).density()
    random = torch.rand(1, 2, 16, 16, generator=generator).argsort(-1) < round(kept * 16)
    order = mechanism.plan(q, k, geometry).rows.order[0, 0]
    mask = random.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., order.argsort()[:, None], order.argsort()]
    assert error < 0.5 * float((attention(q, k, v, mask) - exact).norm())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": (0, 4)}, r"tile=\(0, 4\): expected a height and a width"),
        ({"density": 0.0}, r"density=0\.0: expected a fraction in \(0, 1\]"),
        ({"block": 0}, "block=0: expected at least 1 token"),
    ],
)
def test_refuses_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Draft(**settings)


def test_refuses_another_grid() -> None:
    q, k, v = inputs(30)
    with pytest.raises(ValueError, match=r"tokens=30: expected 32, the tokens of grid=\(4, 8\)"):
        Draft()(q, k, v, geometry=Geometry(grid=(4, 8)))


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    q, k, v = inputs(tokens)
    assert Draft()(q, k, v).shape == q.shape
