"""Bi-level routing against its definition: region means over all heads, the best regions, dense softmax over them."""

from __future__ import annotations

import itertools

import pytest
import torch

from saccade.mechanisms.where.biformer import BiFormer
from saccade.types import Geometry


def regions_of(grid: tuple[int, ...], windows: int) -> list[list[int]]:
    """Places in the grid of each region's tokens."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, x in enumerate(itertools.product(*map(range, grid))):
        groups.setdefault(tuple(a // max(n // windows, 1) for a, n in zip(x, grid, strict=True)), []).append(place)
    return list(groups.values())


def oracle_mask(q: torch.Tensor, k: torch.Tensor, mechanism: BiFormer, geometry: Geometry) -> torch.Tensor:
    """Routing on all heads side by side, as on the channels of a feature map."""
    batch, heads, total, _ = q.shape
    grid = (total,) if geometry.grid is None else geometry.grid
    groups = [[geometry.prefix + p for p in region] for region in regions_of(grid, mechanism.windows)]
    k = k.repeat_interleave(heads // k.shape[1], 1)
    channels = [x.transpose(1, 2).flatten(2) for x in (q, k)]  # [B, N, C]
    mask = torch.ones(batch, heads, total, total, dtype=torch.bool)
    for b in range(batch):
        q_means, k_means = (torch.stack([x[b, region].mean(0) for region in groups]) for x in channels)
        for r, scores in enumerate(q_means @ k_means.T):
            best = scores.sort(descending=True).indices[: mechanism.topk].tolist()
            for c in set(range(len(groups))) - set(best):
                mask[b, :, torch.tensor(groups[r])[:, None], torch.tensor(groups[c])] = False
    return mask


def attention(q, k, v, mask, scale=None):
    """softmax(scale q k^T) v over True pairs."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~mask, -float("inf")).softmax(-1) @ v


def inputs(tokens: int, heads: int = 4, groups: int = 2, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, n, tokens, 8) for n in (heads, groups, groups))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).cumsum(2) / 3 for shape in shapes]


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(grid=(8, 12)),
        Geometry(grid=(9, 10), prefix=3, suffix=2),
        Geometry(grid=(3, 5, 6), suffix=1),
        Geometry(grid=(2, 30)),
        Geometry(),
    ],
    ids=str,
)
@pytest.mark.parametrize(("windows", "topk"), [(4, 2), (3, 4), (7, 1), (1, 5)])
def test_output_is_that_of_the_formula(windows: int, topk: int, geometry: Geometry) -> None:
    tokens = 71 if geometry.grid is None else geometry.grid_tokens + geometry.prefix + geometry.suffix
    q, k, v = inputs(tokens)
    mechanism = BiFormer(windows=windows, topk=topk, block=8)
    mask = oracle_mask(q, k, mechanism, geometry)
    layout = mechanism.pattern(q, k, geometry)
    layout.validate()
    assert layout.density() == pytest.approx(float(mask.double().mean()), abs=1e-12)
    out = mechanism(q, k, v, geometry=geometry, scale=32**-0.5)
    torch.testing.assert_close(out, attention(q, k, v, mask, 32**-0.5), rtol=0, atol=1e-10)


def test_known_by_hand() -> None:
    """2 x 4 in four regions of two; every query of a column pair likes the keys of the next pair in its row."""
    directions = torch.eye(4)
    k = directions[[0, 0, 1, 1, 2, 2, 3, 3]][None, None]
    q = directions[[1, 1, 0, 0, 3, 3, 2, 2]][None, None]
    plan = BiFormer(windows=2, topk=1, block=2).plan(q, k, Geometry(grid=(2, 4)))
    swapped = torch.eye(4, dtype=torch.bool)[[1, 0, 3, 2]]
    assert torch.equal(plan.layout.block_mask()[0, 0], swapped)


def test_better_than_random_regions() -> None:
    """On a smooth field, routed regions err less than as many random ones."""
    generator = torch.Generator().manual_seed(0)
    place = torch.stack(torch.meshgrid(*(torch.linspace(0, 3, 16),) * 2, indexing="ij"), -1).view(256, 2)
    field = torch.cat([place.sin(), place.cos()], -1) @ torch.randn(4, 16, generator=generator) * 2
    q, k = (field + 0.3 * torch.randn(1, 2, 256, 16, generator=generator) for _ in range(2))
    v = torch.randn(1, 2, 256, 16, generator=generator) + field
    exact = attention(q, k, v, torch.ones(256, 256, dtype=torch.bool))
    mechanism, geometry = BiFormer(windows=4, topk=4, block=16), Geometry(grid=(16, 16))
    error = float((mechanism(q, k, v, geometry=geometry) - exact).norm())
    random = torch.rand(1, 1, 16, 16, generator=generator).argsort(-1) < 4
    back = mechanism.plan(q, k, geometry).rows.order[0, 0].argsort()
    mask = random.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., back[:, None], back]
    assert error < 0.6 * float((attention(q, k, v, mask) - exact).norm())


@pytest.mark.parametrize(("name", "value"), [("windows", 0), ("topk", 0), ("block", 0)])
def test_bad_setting(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        BiFormer(**{name: value})


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    q, k, v = inputs(tokens)
    assert BiFormer()(q, k, v).shape == q.shape
