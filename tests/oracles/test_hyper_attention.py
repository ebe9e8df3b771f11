"""HyperAttention against its rule, query by query: sorted hashes, blocks, samples, and halves."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.where.hyper_attention import HyperAttention
from saccade.types import Geometry


def gray_order(bits: int) -> list[int]:
    """The codes of so many bits in an order in which neighbours differ in one bit."""
    if bits == 0:
        return [0]
    before = gray_order(bits - 1)
    return before + [code + 2 ** (bits - 1) for code in reversed(before)]


def sorted_by_hash(x: torch.Tensor, mechanism: HyperAttention) -> list[int]:
    """Places of the tokens `[N, D]` by hash, earlier ones first where hashes are equal."""
    generator = torch.Generator().manual_seed(mechanism.seed)
    directions = torch.randn(x.shape[1], mechanism.projections, generator=generator, dtype=torch.float64)
    order = gray_order(mechanism.projections)
    hashes = []
    for token in x.detach().double():
        code = sum(2**bit for bit in range(mechanism.projections) if float(token @ directions[:, bit]) > 0)
        hashes.append(order.index(code))
    return sorted(range(len(x)), key=lambda i: (hashes[i], i))


def square(q, k, mechanism: HyperAttention, padded: int) -> torch.Tensor:
    """How often each key counts for each query, `[m, n]`, where queries are padded to so many."""
    rows, columns = sorted_by_hash(q, mechanism), sorted_by_hash(k, mechanism)
    blocks = math.ceil(len(k) / mechanism.block)
    height = math.ceil(padded / blocks)
    drawn = torch.randint(
        len(k), (mechanism.samples,), generator=torch.Generator().manual_seed(mechanism.seed + 1)
    ).tolist()
    counts = torch.zeros(len(q), len(k), dtype=torch.float64)
    for place, i in enumerate(rows):
        for other, j in enumerate(columns):
            if place // height == other // mechanism.block:
                counts[i, j] = 1.0
        for other in drawn if len(k) > mechanism.block else ():
            if place // height != other // mechanism.block:
                counts[i, columns[other]] += len(k) / mechanism.samples
    return counts


def recursion(q, k, mechanism: HyperAttention, first: int, size: int, counts: torch.Tensor) -> None:
    """Fill in the counts of the causal sequence of `size` tokens from `first` on."""
    half = size // 2
    last = min(first + size, len(q))
    if size % 2 or half < mechanism.min_tokens:
        for i in range(first, last):
            counts[i, first : i + 1] = 1.0
        return
    middle = first + half
    if middle < last:
        counts[middle:last, first:middle] = square(q[middle:last], k[first:middle], mechanism, half)
    recursion(q, k, mechanism, first, half, counts)
    recursion(q, k, mechanism, middle, half, counts)


def oracle(q, k, v, mechanism: HyperAttention, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and counts of one head."""
    tokens = len(q)
    counts = torch.zeros(tokens, tokens, dtype=torch.float64)
    if causal:
        chunk, pieces = tokens, 1
        while math.ceil(chunk / 2) >= mechanism.min_tokens:
            chunk, pieces = math.ceil(chunk / 2), 2 * pieces
        recursion(q, k, mechanism, 0, chunk * pieces, counts)
    elif tokens < mechanism.min_tokens:
        counts += 1.0
    else:
        counts = square(q, k, mechanism, tokens)
    weights = counts * (q @ k.T / math.sqrt(q.shape[1])).exp()
    return weights @ v / weights.sum(1, keepdim=True), counts


def inputs(tokens: int, heads: int = 2, groups: int = 1, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, n, tokens, 6) for n in (heads, groups, groups))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [16, 37, 64, 91])
@pytest.mark.parametrize(
    "settings",
    [
        {"projections": 3, "block": 8, "samples": 5, "min_tokens": 8},
        {"projections": 5, "block": 5, "samples": 0, "min_tokens": 11, "seed": 3},
        {"projections": 1, "block": 40, "samples": 7, "min_tokens": 4},
    ],
    ids=str,
)
def test_output_and_gradients_are_those_of_the_rule(settings: dict, tokens: int, causal: bool) -> None:
    q, k, v = leaves = [x.requires_grad_() for x in inputs(tokens)]
    mechanism, geometry = HyperAttention(**settings), Geometry(causal=causal)
    cells = [[oracle(q[b, h], k[b, 0], v[b, 0], mechanism, causal) for h in (0, 1)] for b in (0, 1)]
    wanted = torch.stack([torch.stack([out for out, _ in row]) for row in cells])
    out, lse = mechanism(q, k, v, geometry=geometry, return_lse=True)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
    counts = torch.stack([torch.stack([counts for _, counts in row]) for row in cells])
    total = (counts * (q @ k.mT / 6**0.5).exp()).sum(-1).log()
    torch.testing.assert_close(lse, total, rtol=0, atol=1e-10)
    if settings["samples"] == 0:
        pattern = mechanism.pattern(q.detach(), k.detach(), geometry)
        pattern.validate()
        assert torch.equal(pattern.to_dense(), counts > 0)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, gradient in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-9)


def test_known_by_hand() -> None:
    """Two kinds of tokens that point apart hash apart: each query meets its own kind only."""
    kinds = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    q = torch.tensor([[5.0, 1.0], [-5.0, -1.0]])[kinds][None, None]
    v = torch.arange(8.0)[None, None, :, None]
    out = HyperAttention(projections=4, block=4, samples=0, min_tokens=2)(q, q, v)[0, 0, :, 0]
    means = torch.tensor([(0 + 3 + 5 + 6) / 4, (1 + 2 + 4 + 7) / 4])
    torch.testing.assert_close(out, means[kinds])


def test_samples_are_unbiased() -> None:
    """The mean over seeds of the estimated sum of weights is the exact sum."""
    q, k, v = inputs(64, heads=1, batch=1)
    exact = (q @ k.mT / 6**0.5).exp().sum(-1)
    found = []
    for seed in range(300):
        mechanism = HyperAttention(projections=4, block=8, samples=24, min_tokens=2, seed=seed)
        found.append(mechanism(q, k, v, return_lse=True).lse.exp())
    ratio = torch.stack(found).mean(0) / exact
    assert abs(float(ratio.mean()) - 1) < 0.02
    assert float((ratio - 1).abs().max()) < 0.3


def test_errs_less_than_random_blocks_and_than_without_samples() -> None:
    """Tokens of 8 topics in random order."""
    generator = torch.Generator().manual_seed(0)
    topics = 2.5 * torch.randn(8, 16, generator=generator)
    which = torch.randint(8, (256,), generator=generator)
    q, k = (topics[which] + 0.5 * torch.randn(1, 2, 256, 16, generator=generator) for _ in range(2))
    v = torch.randn(8, 16, generator=generator)[which] + 0.5 * torch.randn(1, 2, 256, 16, generator=generator)
    exact = (q @ k.mT / 4).softmax(-1) @ v
    settings = {"projections": 6, "block": 64, "min_tokens": 2}
    errors = [float((HyperAttention(**settings, samples=n)(q, k, v) - exact).norm()) for n in (64, 0)]
    blocks = torch.rand(1, 2, 16, 16, generator=generator).argsort(-1) < 8  # as many pairs, samples counted
    mask = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)
    drawn = (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    assert errors[0] < 0.9 * errors[1]
    assert errors[0] < 0.7 * float((drawn - exact).norm())


@pytest.mark.parametrize(
    ("name", "value"), [("projections", 0), ("block", 0), ("samples", -1), ("min_tokens", 1), ("seed", -1)]
)
def test_bad_setting(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        HyperAttention(**{name: value})


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
def test_hardly_any_tokens(tokens: int, causal: bool) -> None:
    q, k, v = inputs(tokens)
    out = HyperAttention(min_tokens=2, block=1)(q, k, v, geometry=Geometry(causal=causal))
    assert out.shape == q.shape
    assert bool(out.isfinite().all())
