"""LLSA against its definition, block by block and query by query, with gradients through the means."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from saccade.mechanisms.where._orders import z_order
from saccade.mechanisms.where.llsa import LLSA
from saccade.types import Geometry


def means(x: torch.Tensor, size: int) -> torch.Tensor:
    """Mean of each run of `size` rows, the last one shorter."""
    return torch.stack([part.mean(0) for part in x.split(size)])


def interleaved(x: tuple[int, ...], bits: int = 6) -> int:
    """Place of a cell in Z order."""
    return sum((c >> bit & 1) << (bit * len(x) + len(x) - 1 - a) for bit in range(bits) for a, c in enumerate(x))


def oracle(q, k, v, mechanism: LLSA, levels: int, geometry: Geometry) -> torch.Tensor:
    """The output of one head: q, k `[N, D]`, v `[N, E]`."""
    total, dim = q.shape
    grid = (total,) if geometry.grid is None else geometry.grid
    cells = (
        sorted(itertools.product(*map(range, grid)), key=interleaved) if len(grid) > 1 else [(i,) for i in range(total)]
    )
    inside = [geometry.prefix + sum(c * math.prod(grid[a + 1 :]) for a, c in enumerate(x)) for x in cells]
    if len(grid) == 1:
        inside = [geometry.prefix + i for i in range(grid[0])]
    text = [i for i in range(total) if i not in inside]
    width, count = mechanism.block, len(inside)
    qs, ks, vs = [q[inside]], [k[inside]], [v[inside]]
    for _ in range(levels):
        qs, ks, vs = (xs + [means(xs[-1], width)] for xs in (qs, ks, vs))
    picked: list[list[list[int]]] = [[] for _ in range(levels + 1)]
    for level in range(levels, 0, -1):
        for i in range(len(qs[level])):
            children = range(len(ks[level]))
            if level < levels:
                parents = picked[level + 1][i // width]
                children = [c for p in parents for c in range(p * width, (p + 1) * width) if c < len(ks[level])]
            score = {c: float(qs[level][i].detach() @ ks[level][c].detach()) for c in children}
            picked[level].append(sorted(score, key=lambda c: -score[c])[: mechanism.topk])
    out = torch.zeros(total, v.shape[1], dtype=v.dtype)
    for n, token in enumerate(inside):
        fine = [j for c in picked[1][n // width] for j in range(c * width, min((c + 1) * width, count))]
        scores = [q[token] @ k[inside[j]] / dim**0.5 for j in fine] + [q[token] @ k[j] / dim**0.5 for j in text]
        values = [v[inside[j]] for j in fine] + [v[j] for j in text]
        for level in range(1, levels + 1) if mechanism.enrich else ():
            span = width**level
            parents = range(len(ks[level])) if level == levels else picked[level + 1][n // width ** (level + 1)]
            seen = parents if level == levels else [c for p in parents for c in range(p * width, (p + 1) * width)]
            for c in (c for c in seen if c < len(ks[level])):
                stands_for = min(span, count - c * span)
                scores.append(q[token] @ ks[level][c] / dim**0.5 + math.log(stands_for))
                values.append(vs[level][c])
        out[token] = torch.stack(scores).softmax(0) @ torch.stack(values)
    for token in text:
        out[token] = (q[token] @ k.T / dim**0.5).softmax(0) @ v
    return out


def inputs(tokens: int, heads: int = 2, groups: int = 1, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, n, tokens, 8) for n in (heads, groups, groups))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).cumsum(2) / 3 for shape in shapes]


CASES = [
    (Geometry(), {"topk": 3, "levels": 2}),
    (Geometry(), {"topk": 2, "levels": 3, "block": 3}),
    (Geometry(grid=(8, 8)), {"topk": 2, "levels": 2}),
    (Geometry(grid=(5, 9), prefix=3), {"topk": 2, "levels": 2}),
    (Geometry(grid=(3, 4, 5), prefix=2, suffix=5), {"topk": 1, "levels": 3}),
    (Geometry(grid=(6, 7), suffix=1), {"topk": 4, "levels": 1}),
    (Geometry(grid=(6, 7), suffix=1), {"topk": 2, "levels": 2, "enrich": False}),
]


@pytest.mark.parametrize(("geometry", "settings"), CASES, ids=str)
def test_output_and_gradients_are_those_of_the_formula(geometry: Geometry, settings: dict) -> None:
    tokens = 53 if geometry.grid is None else geometry.grid_tokens + geometry.prefix + geometry.suffix
    leaves = [x.requires_grad_() for x in inputs(tokens)]
    mechanism = LLSA(**{"block": 4, **settings})
    q, k, v = leaves
    rows = [
        [oracle(q[b, h], k[b, 0], v[b, 0], mechanism, settings["levels"], geometry) for h in (0, 1)] for b in (0, 1)
    ]
    wanted = torch.stack([torch.stack(row) for row in rows])
    out = mechanism(q, k, v, geometry=geometry)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, gradient in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-9)


def test_known_by_hand() -> None:
    """Eight tokens, two children a block: the best half of the upper level, then the best block below it."""
    k = torch.tensor([0.0, 0.0, 3.0, 3.0, 1.0, 1.0, 5.0, 5.0])[None, None, :, None]
    q = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0])[None, None, :, None]
    layout = LLSA(block=2, topk=1, levels=2).pattern(q, k)
    # The first half of the queries is 0 in the mean, and so are all its scores at level 2: the first half of the keys.
    assert layout.block_mask()[0, 0].int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]


def test_equal_tokens_weigh_as_many() -> None:
    """With equal keys every mean is the key itself: each token of v is seen once fine and once for every level."""
    q, k, v = inputs(16, batch=1)
    k = k[:, :, :1].expand_as(k)
    out = LLSA(block=4, topk=4, levels=1)(q, k, v)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("topk", "cells", "depth"), [(8, 16, 1), (8, 127, 1), (8, 2049, 2), (8, 16**4, 3), (1, 3, 1)])
def test_the_coarsest_level_has_few_blocks(topk: int, cells: int, depth: int) -> None:
    mechanism = LLSA(topk=topk)
    assert mechanism._depth(cells) == depth


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (4, 4, 4), (3, 5), (7,)])
def test_z_order(grid: tuple[int, ...]) -> None:
    cells = list(itertools.product(*map(range, grid)))
    wanted = sorted(range(len(cells)), key=lambda i: interleaved(cells[i]))
    assert z_order(grid).tolist() == wanted


def test_better_than_random_blocks_and_better_enriched() -> None:
    """On a smooth field, found blocks err less than random ones, and means of the rest lower the error again."""
    generator = torch.Generator().manual_seed(0)
    place = torch.stack(torch.meshgrid(*(torch.linspace(0, 3, 16),) * 2, indexing="ij"), -1).view(256, 2)
    field = torch.cat([place.sin(), place.cos()], -1) @ torch.randn(4, 16, generator=generator)
    q, k = (field + 0.3 * torch.randn(1, 2, 256, 16, generator=generator) for _ in range(2))
    v = torch.randn(1, 2, 256, 16, generator=generator) + field
    geometry = Geometry(grid=(16, 16))
    exact = (q @ k.mT / 4).softmax(-1) @ v
    plain, enriched = (LLSA(block=4, topk=12, levels=2, enrich=e)(q, k, v, geometry=geometry) for e in (False, True))
    back = z_order((16, 16)).argsort()
    random = torch.rand(1, 2, 64, 64, generator=generator).argsort(-1) < 12
    mask = random.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., back[:, None], back]
    drawn = (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    errors = [float((out - exact).norm()) for out in (enriched, plain, drawn)]
    assert errors[0] < 0.8 * errors[1] < 0.8 * 0.8 * errors[2]


@pytest.mark.parametrize(("name", "value"), [("block", 1), ("topk", 0), ("levels", 0)])
def test_bad_setting(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        LLSA(**{name: value})


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    q, k, v = inputs(tokens)
    assert LLSA()(q, k, v).shape == q.shape
