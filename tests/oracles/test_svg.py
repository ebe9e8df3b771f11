"""Sparse VideoGen against its rule: two bands, the head's own by the error of sampled queries, pair by pair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from saccade.mechanisms.where.svg import SVG
from saccade.types import Geometry


def attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over True pairs."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -float("inf")).softmax(-1) @ v


def bands(total: int, mechanism: SVG, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """The spatial and the temporal mask `[N, N]` in the order of the tokens."""
    frames = (total,) if geometry.grid is None else geometry.grid
    cells, text = math.prod(frames), geometry.prefix + geometry.suffix
    per_frame = cells // frames[0]
    share = max(mechanism.density - 2 * text / total, 0)
    width = max(int(total * (1 - math.sqrt(1 - share))) // mechanism.block, 1) * mechanism.block
    masks = [torch.ones(total, total, dtype=torch.bool) for _ in range(2)]
    for i, j in itertools.product(range(cells), repeat=2):
        a, b = ((x % per_frame) * frames[0] + x // per_frame for x in (i, j))
        masks[0][geometry.prefix + i, geometry.prefix + j] = abs(i - j) < width
        masks[1][geometry.prefix + i, geometry.prefix + j] = abs(a - b) < width
    return masks[0], masks[1]


def inputs(geometry: Geometry, total: int) -> list[torch.Tensor]:
    """Four heads that look along the frame, along time, along the frame and at nothing in particular."""
    generator = torch.Generator().manual_seed(total)
    frames = (total,) if geometry.grid is None else geometry.grid
    cells = math.prod(frames)
    per_frame = cells // frames[0]
    place = torch.arange(total) - geometry.prefix
    keys = [(place // per_frame)[:, None], (place % per_frame)[:, None]]
    ways = [torch.cat([x / 2, x / 3, x], 1).to(torch.float64) for x in keys]
    features = [torch.cat([way.sin(), way.cos()], 1) * 4 for way in ways]
    noise = torch.randn(2, 4, total, 6, generator=generator, dtype=torch.float64)
    q = torch.stack([features[0], features[1], features[0], features[0] * 0])[None] + noise / 3
    v = torch.randn(2, 4, total, 5, generator=generator, dtype=torch.float64)
    return [q, q + torch.randn(q.shape, generator=generator, dtype=torch.float64) / 3, v]


GEOMETRIES = [
    Geometry(grid=(6, 4, 5)),
    Geometry(grid=(5, 3, 7), prefix=4, suffix=3),
    Geometry(grid=(9, 11), suffix=6),
    Geometry(),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.6])
def test_output_is_that_of_the_rule(density: float, geometry: Geometry) -> None:
    total = 70 if geometry.grid is None else geometry.grid_tokens + geometry.prefix + geometry.suffix
    q, k, v = inputs(geometry, total)
    mechanism = SVG(density=density, block=8, samples=total)  # all queries are samples, so the order drawn is no matter
    outs = [attention(q, k, v, mask) for mask in bands(total, mechanism, geometry)]
    full = attention(q, k, v, torch.ones(total, total, dtype=torch.bool))
    rows = slice(geometry.prefix, total - geometry.suffix)
    errors = [(out - full)[:, :, rows].square().mean((2, 3)) for out in outs]
    temporal = errors[1] < errors[0]
    out = mechanism(q, k, v, geometry=geometry)
    torch.testing.assert_close(out, torch.where(temporal[..., None, None], outs[1], outs[0]), rtol=0, atol=1e-10)
    if geometry.grid is not None:
        assert temporal[:, 1].all()
        assert not temporal[:, 0].any()


def test_few_samples_find_the_same_heads() -> None:
    geometry = Geometry(grid=(6, 4, 5))
    q, k, v = inputs(geometry, 120)
    plans = [SVG(block=8, samples=n).plan_with_values(q, k, v, geometry) for n in (8, 120)]
    assert torch.equal(plans[0].rows.order[:, :3], plans[1].rows.order[:, :3])
    by_weights = SVG(block=8, samples=8).plan(q, k, geometry)
    assert torch.equal(by_weights.rows.order[:, :3], plans[1].rows.order[:, :3])


def test_shared_keys_serve_heads_of_both_kinds() -> None:
    geometry = Geometry(grid=(6, 4, 5), suffix=2)
    q, k, v = inputs(geometry, 122)
    k, v = k.mean(1, keepdim=True), v[:, :1]
    out = SVG(density=0.5, block=8)(q, k, v, geometry=geometry)
    repeated = SVG(density=0.5, block=8)(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1), geometry=geometry)
    torch.testing.assert_close(out, repeated, rtol=0, atol=1e-12)


def test_known_by_hand() -> None:
    """Three frames of two places, a band of three: places that attend to themselves alone make a head temporal."""
    q = torch.zeros(1, 1, 6, 2)
    mechanism, geometry = SVG(density=0.75, block=1), Geometry(grid=(3, 2))
    spatial, temporal = bands(6, mechanism, geometry)
    assert spatial[0].tolist() == [True, True, True, False, False, False]
    assert temporal[0].tolist() == [True, False, True, False, True, False]
    plan = mechanism.plan(q, q, geometry)
    assert plan.rows.order.tolist() == [[[0, 1, 2, 3, 4, 5]]]  # a tie is spatial
    assert torch.equal(plan.layout.to_dense()[0, 0], spatial)
    q, k = (torch.tensor(x)[None, None, :, None] for x in ([20.0, -20.0] * 3, [1.0, -1.0] * 3))
    plan = mechanism.plan(q, k, geometry)
    assert plan.rows.order.tolist() == [[[0, 2, 4, 1, 3, 5]]]


def test_better_than_random_blocks() -> None:
    geometry = Geometry(grid=(16, 4, 4))
    q, k, v = inputs(geometry, 256)
    v = v + q[..., :5]
    exact = attention(q, k, v, torch.ones(256, 256, dtype=torch.bool))
    mechanism = SVG(density=0.4, block=16)
    density = mechanism.plan(q, k, geometry).layout.density()
    error = (mechanism(q, k, v, geometry=geometry) - exact)[:, :2].norm()
    blocks = torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).argsort(-1) < round(density * 16)
    random = attention(q, k, v, blocks.repeat_interleave(16, 2).repeat_interleave(16, 3))
    assert float(error) < 0.8 * float((random - exact)[:, :2].norm())


@pytest.mark.parametrize(("name", "value"), [("density", 0.0), ("density", 1.5), ("samples", 0), ("block", 0)])
def test_bad_setting(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        SVG(**{name: value})


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    q = torch.zeros(2, 2, tokens, 4)
    assert SVG()(q, q, q).shape == q.shape
