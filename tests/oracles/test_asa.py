"""BLADE's ASA against its rule, block by block: samples, ranks, and keys averaged by rank."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.where._orders import hilbert_order
from saccade.mechanisms.where.asa import ASA
from saccade.types import Geometry


def sampled(block: list[int], size: int, mechanism: ASA, number: int) -> list[int]:
    """The tokens of a block that are sampled; the last one stands for those that a short block lacks."""
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(mechanism.seed + number))
    return [block[min(int(place), len(block) - 1)] for place in drawn[: mechanism.samples]]


def oracle(q, k, v, mechanism: ASA, geometry: Geometry) -> torch.Tensor:
    """The output of one head."""
    total, dim = q.shape
    grid = (total,) if geometry.grid is None else geometry.grid
    order = hilbert_order(grid).tolist() if len(grid) > 1 else list(range(grid[0]))
    tokens, size = [geometry.prefix + cell for cell in order], mechanism.block
    text = [i for i in range(total) if i not in tokens]
    blocks = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    queries, keys = ([sampled(block, size, mechanism, number) for block in blocks] for number in (0, 1))
    every_key = [j for block in keys for j in block]
    out = torch.zeros(total, v.shape[1], dtype=v.dtype)
    for block, mine in zip(blocks, queries, strict=True):
        scores = [(q[i] @ k[every_key].T / dim**0.5).split([len(theirs) for theirs in keys]) for i in mine]
        best = [[float(part.detach().max()) for part in row] for row in scores]  # of each sampled query in each block
        worth = [max(math.exp(row[c] - max(row)) for row in best) for c in range(len(blocks))]
        found_k, found_v, weights = [k[text]], [v[text]], [1.0] * len(text)
        for rank, c in enumerate(sorted(range(len(blocks)), key=lambda c: -worth[c])):
            limits = [int(share * len(blocks)) for share in mechanism.shares]
            step = next((s for s, limit in zip((1, 2, 4, 8), limits, strict=True) if rank < limit or rank + s == 1), 0)
            for start in range(0, len(blocks[c]), step) if step else ():
                run = blocks[c][start : start + step]
                found_k.append(k[run].mean(0, keepdim=True))
                found_v.append(v[run].mean(0, keepdim=True))
                weights.append(float(len(run)))
        scores = q[block] @ torch.cat(found_k).T / dim**0.5 + torch.tensor(weights, dtype=q.dtype).log()
        out[block] = scores.softmax(1) @ torch.cat(found_v)
    out[text] = (q[text] @ k.T / dim**0.5).softmax(1) @ v
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
@pytest.mark.parametrize(
    "settings", [{"shares": (0.2, 0.4, 0.6, 0.8)}, {"shares": (0.0, 0.1, 0.7, 0.7)}, {"samples": 8}], ids=str
)
def test_output_and_gradients_are_those_of_the_rule(settings: dict, geometry: Geometry) -> None:
    tokens = 61 if geometry.grid is None else geometry.grid_tokens + geometry.prefix + geometry.suffix
    q, k, v = leaves = [x.requires_grad_() for x in inputs(tokens)]
    mechanism = ASA(**{"block": 8, "samples": 3, **settings})
    wanted = torch.stack([
        torch.stack([oracle(q[b, h], k[b, 0], v[b, 0], mechanism, geometry) for h in (0, 1)]) for b in (0, 1)
    ])  # fmt: skip
    out, lse = mechanism(q, k, v, geometry=geometry, return_lse=True)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
    assert lse.shape == (2, 2, tokens)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, gradient in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-9)


def test_known_by_hand() -> None:
    """Four blocks of equal tokens, every query like block 2 > 1 > 3 > 0: in full, by two, by four, not at all."""
    worth = torch.tensor([0.0, 2.0, 3.0, 1.0])
    k = worth.repeat_interleave(8)[None, None, :, None]
    mechanism = ASA(shares=(0.25, 0.5, 0.75, 0.75), samples=2, block=8)
    q = torch.ones_like(k)
    _, steps = mechanism._steps(q, k, Geometry())
    assert steps[0, 0].tolist() == [[0, 2, 1, 4]] * 4
    v = torch.randn(1, 1, 32, 3, generator=torch.Generator().manual_seed(0))
    kept = slice(8, 32)  # averaging equal keys changes nothing
    exact = (q @ k[:, :, kept].mT).softmax(-1) @ v[:, :, kept]
    torch.testing.assert_close(mechanism(q, k, v), exact, rtol=0, atol=1e-6)


def test_bounded_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(61)
    mechanism = ASA(block=8, samples=3)
    whole = mechanism(q, k, v)
    monkeypatch.setattr("saccade.mechanisms.where.asa.WORKSPACE", 100)
    assert torch.equal(mechanism(q, k, v), whole)


def test_better_than_random_blocks_and_better_with_coarse_keys() -> None:
    """On a smooth field, ranked blocks err less than random ones, and averaged keys of the rest lower it again."""
    generator = torch.Generator().manual_seed(0)
    place = torch.stack(torch.meshgrid(*(torch.linspace(0, 3, 16),) * 2, indexing="ij"), -1).view(256, 2)
    field = torch.cat([place.sin(), place.cos()], -1) @ torch.randn(4, 16, generator=generator)
    q, k = (field + 0.3 * torch.randn(1, 2, 256, 16, generator=generator) for _ in range(2))
    v = torch.randn(1, 2, 256, 16, generator=generator) + field
    exact = (q @ k.mT / 4).softmax(-1) @ v
    geometry = Geometry(grid=(16, 16))
    same = {"samples": 8, "block": 16}
    coarse, plain = (
        ASA(shares=shares, **same)(q, k, v, geometry=geometry)
        for shares in ((0.25, 0.5, 0.75, 1.0), (0.25, 0.25, 0.25, 0.25))
    )
    back = hilbert_order((16, 16)).argsort()
    blocks = torch.rand(1, 2, 16, 16, generator=generator).argsort(-1) < math.ceil(0.25 * 16)
    mask = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., back[:, None], back]
    drawn = (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    errors = [float((out - exact).norm()) for out in (coarse, plain, drawn)]
    assert errors[0] < 0.8 * errors[1] < 0.8 * 0.8 * errors[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": (0.5, 0.4, 0.6, 0.8)}, r"shares=\(0\.5, 0\.4, 0\.6, 0\.8\): expected four fractions"),
        ({"shares": (0.5, 0.6)}, r"shares=\(0\.5, 0\.6\): expected four fractions"),
        ({"samples": 0}, "samples=0: expected at least 1 token"),
        ({"block": 12}, "block=12: expected a multiple of 8 tokens"),
    ],
)
def test_refuses_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ASA(**settings)


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    q, k, v = inputs(tokens)
    out = ASA()(q, k, v)
    torch.testing.assert_close(out, v.expand_as(q), rtol=0, atol=1e-12)
