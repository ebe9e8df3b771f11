"""Rectified SpaAttn against its formulas, block by block: pooled shares, gain and error, the rectified output."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from saccade.mechanisms.where._orders import hilbert_order
from saccade.mechanisms.where.rectified import Rectified
from saccade.types import Geometry


def touching(cells_of: list[list[tuple[int, ...]]]) -> set[tuple[int, int]]:
    """Pairs of blocks with cells at most one apart along every axis."""
    return {
        (r, c)
        for (r, a), (c, b) in itertools.product(enumerate(cells_of), repeat=2)
        if any(max(abs(x - y) for x, y in zip(one, two, strict=True)) <= 1 for one in a for two in b)
    }


def oracle(q, k, v, mechanism: Rectified, geometry: Geometry, scale: float) -> torch.Tensor:
    """The output of one head."""
    total = len(q)
    grid = (total,) if geometry.grid is None else geometry.grid
    order = hilbert_order(grid).tolist() if len(grid) > 1 else list(range(grid[0]))
    coordinates = list(itertools.product(*map(range, grid)))
    size = mechanism.block
    runs = [order[start : start + size] for start in range(0, len(order), size)]
    blocks = [[geometry.prefix + cell for cell in run] for run in runs]
    text = [i for i in range(total) if not geometry.prefix <= i < total - geometry.suffix]
    near = touching([[coordinates[cell] for cell in run] for run in runs]) if mechanism.neighbors else set()
    out = torch.zeros(total, v.shape[1], dtype=v.dtype)
    for r, rows in enumerate(blocks):
        pooled = q[rows].mean(0)
        deviation = (q[rows] - pooled).abs().mean(0)
        parts, gains = [], []
        for keys in blocks:
            mean = k[keys].mean(0)
            parts.append(len(keys) * torch.exp(pooled @ mean * scale))
            error = (deviation @ mean).abs() + (pooled @ (k[keys] - mean).abs().mean(0)).abs()
            gains.append(bool((pooled @ mean).abs() > error))
        parts.append(torch.exp(k[text] @ pooled * scale).sum())
        share = torch.stack(parts) / torch.stack(parts).sum()
        kept, running = set(), 0.0
        for rank, c in enumerate(sorted(range(len(share)), key=lambda c: -share[c].item())):
            if running <= mechanism.top_p or rank < int(mechanism.least * len(blocks)):
                kept.add(c)
            running += share[c].item()
        kept |= {c for one, c in near if one == r}
        seen = [j for c in sorted(kept) if c < len(blocks) for j in blocks[c]] + text
        restored = [c for c in range(len(blocks)) if c not in kept and gains[c]]
        critical = 1 - sum(share[c] for c in restored)
        extra = sum((share[c] * v[blocks[c]].mean(0) for c in restored), torch.zeros(v.shape[1], dtype=v.dtype))
        out[rows] = critical * (q[rows] @ k[seen].T * scale).softmax(1) @ v[seen] + extra
    out[text] = (q[text] @ k.T * scale).softmax(1) @ v
    return out


def inputs(tokens: int, heads: int = 2, groups: int = 1, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, n, tokens, 8) for n in (heads, groups, groups))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).cumsum(2) / 3 for shape in shapes]


GEOMETRIES = [
    Geometry(grid=(8, 8)),
    Geometry(grid=(4, 4, 4), prefix=3, suffix=2),
    Geometry(grid=(3, 5, 6), suffix=9),
    Geometry(grid=(67,), prefix=1),
    Geometry(),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("settings", [{"neighbors": False, "least": 0.0}, {"top_p": 0.6, "least": 0.4}], ids=str)
@pytest.mark.parametrize("scale", [None, 0.1])
def test_output_and_gradients_are_those_of_the_formula(scale, settings: dict, geometry: Geometry) -> None:
    tokens = 61 if geometry.grid is None else geometry.grid_tokens + geometry.prefix + geometry.suffix
    q, k, v = leaves = [x.requires_grad_() for x in inputs(tokens)]
    mechanism = Rectified(**{"block": 8, "top_p": 0.3, **settings})
    factor = 8**-0.5 if scale is None else scale
    wanted = torch.stack([
        torch.stack([oracle(q[b, h], k[b, 0], v[b, 0], mechanism, geometry, factor) for h in (0, 1)]) for b in (0, 1)
    ])  # fmt: skip
    out = mechanism(q, k, v, geometry=geometry, scale=scale)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, gradient in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-9)


def test_known_by_hand() -> None:
    """Blocks of equal tokens have no pooling error, so that the rectified output is that of full attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    q, k, v = (x.repeat_interleave(4, 2) for x in (q, k, v))
    mechanism = Rectified(block=4, top_p=0.01, least=0.0, neighbors=False)
    assert mechanism.pattern(q, k).density() == pytest.approx(1 / 6)
    exact = (q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(mechanism(q, k, v), exact, rtol=0, atol=1e-12)


def test_better_than_random_blocks_and_better_rectified() -> None:
    """On a smooth field, kept blocks err less than random ones, and rectifying lowers the error again."""
    generator = torch.Generator().manual_seed(0)
    place = torch.stack(torch.meshgrid(*(torch.linspace(0, 3, 16),) * 2, indexing="ij"), -1).view(256, 2)
    field = torch.cat([place.sin(), place.cos()], -1) @ torch.randn(4, 16, generator=generator)
    q, k = (field + 0.3 * torch.randn(1, 2, 256, 16, generator=generator) for _ in range(2))
    v = torch.randn(1, 2, 256, 16, generator=generator) + field
    exact = (q @ k.mT / 4).softmax(-1) @ v
    mechanism, geometry = Rectified(block=16, top_p=0.2, least=0.0, neighbors=False), Geometry(grid=(16, 16))
    plan = mechanism.plan(q, k, geometry)
    rectified = mechanism(q, k, v, geometry=geometry)
    back = plan.rows.order[0, 0].argsort()
    blocks = torch.rand(1, 2, 16, 16, generator=generator).argsort(-1) < math.ceil(plan.layout.density() * 16)
    masks = [plan.layout.to_dense(), blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)]
    plain, drawn = (
        (q @ k.mT / 4).masked_fill(~mask[..., back[:, None], back], -torch.inf).softmax(-1) @ v for mask in masks
    )
    errors = [float((out - exact).norm()) for out in (rectified, plain, drawn)]
    assert errors[0] < 0.8 * errors[1] < 0.8 * 0.8 * errors[2]


def test_touching_blocks_are_kept() -> None:
    """Four squares in a row, each with queries and keys of its own: the best block is the own one."""
    square = (torch.arange(16) // 4).repeat(4)
    q = 9 * torch.eye(4)[square][None, None]
    kept = Rectified(block=16, top_p=1e-9, least=0.0).pattern(q, q, Geometry(grid=(4, 16))).block_mask()[0, 0]
    assert kept.equal(torch.ones(4, 4).tril(1).triu(-1).bool())


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.0), ("least", -0.5), ("block", 0)])
def test_bad_setting(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        Rectified(**{name: value})


def test_has_no_log_sum_exp() -> None:
    q, k, v = inputs(9)
    with pytest.raises(ValueError, match="return_lse=True: expected False"):
        Rectified()(q, k, v, return_lse=True)


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    q, k, v = inputs(tokens)
    assert Rectified()(q, k, v).shape == q.shape
