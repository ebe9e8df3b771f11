"""The engine's decoding against an fp64 formula written here: shapes, storages, pages, lists, poison, threads."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.kernels import cpu

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}"),
]

INF = float("inf")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ERROR = {"fp32": 4e-6, "bf16": 2e-2, "fp16": 4e-6}
"""Inputs are exact; only pairs of bf16 round the weights, to 8 bits."""
EXAMPLES = 12 if "SACCADE_SANITIZED" in os.environ else 60
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(q, k, v, mask, scale, softcap=None, bias=None):  # noqa: ANN001, ANN201
    """Rows see only what `mask` lets them: everything else is replaced by 0."""
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    scores = (q @ k.nan_to_num(0, 0, 0).mT) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias.double()
    scores = scores.masked_fill(~mask, -INF)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -INF, 0.0)[..., None])
    return weights @ v.nan_to_num(0, 0, 0), lse


def band(queries: int, keys: int, left: int, right: int) -> Tensor:
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    mask = torch.ones(queries, keys, dtype=torch.bool)
    mask = mask & (distance <= left) if left >= 0 else mask
    return mask & (distance >= -right) if right >= 0 else mask


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], error: float) -> None:
    empty = expected[1] == -INF
    assert torch.equal(found[1] == -INF, empty)
    assert bool((found[0][empty] == 0).all())
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=error)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=0, atol=error)


@fuzz
@given(
    kv_heads=st.integers(1, 3), share=st.sampled_from([1, 2, 3, 4, 7]), queries=st.integers(1, 20),
    keys=st.one_of(st.integers(1, 80), st.sampled_from([511, 512, 513, 1200])), dim=st.integers(1, 130),
    value_dim=st.sampled_from([1, 16, 33, 64, 80, 128]), dtype=st.sampled_from(sorted(DTYPES)),
    left=st.sampled_from([-1, 0, 40]), right=st.sampled_from([-1, 0, 3]), softcap=st.sampled_from([None, 1.5]),
    turned=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape(
    engine: Callable, isa: str, kv_heads: int, share: int, queries: int, keys: int, dim: int, value_dim: int,
    dtype: str, left: int, right: int, softcap: float | None, turned: bool, seed: int,
) -> None:  # fmt: skip
    with engine(isa):
        q = draw(2, kv_heads * share, queries, dim, seed=seed, dtype=DTYPES[dtype])
        k = draw(2, kv_heads, keys, dim, seed=seed + 1, dtype=DTYPES[dtype])
        v = draw(2, kv_heads, keys, value_dim, seed=seed + 2, dtype=DTYPES[dtype])
        if turned:  # as transformers hand them over
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        found = cpu.decoding(q, k, v, scale=dim**-0.5, left=left, right=right, softcap=softcap)
        expected = formula(q, k, v, band(queries, keys, left, right), dim**-0.5, softcap)
        agree(found, expected, ERROR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 600), (5, 90), (9, 4)])
@pytest.mark.parametrize("sides", [(-1, -1), (-1, 0), (40, 3)])
def test_slopes(engine: Callable, isa: str, dtype: str, queries: int, keys: int, sides: tuple[int, int]) -> None:
    shapes = (2, 6, queries, 40), (2, 2, keys, 40), (2, 2, keys, 40)
    q, k, v = (draw(*shape, seed=seed, dtype=DTYPES[dtype]) for seed, shape in enumerate(shapes))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0])
    distance = (torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)).abs()
    lowered = -slopes.double()[:, None, None] * distance
    for softcap in (None, 1.5):
        with engine(isa):
            found = cpu.decoding(q, k, v, scale=0.2, left=sides[0], right=sides[1], softcap=softcap, alibi=slopes)
        expected = formula(q, k, v, band(queries, keys, *sides), 0.2, softcap, lowered)
        agree(found, expected, max(ERROR[dtype], 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_segments(engine: Callable, isa: str, dtype: str) -> None:
    q, k, v = (draw(2, heads, rows, 40, seed=rows, dtype=DTYPES[dtype]) for heads, rows in ((4, 3), (2, 90), (2, 91)))
    v = v[:, :, :90]
    bias = draw(4, 3, 90, seed=5).masked_fill(draw(4, 3, 90, seed=6) > 1, -INF)
    ids = torch.arange(3)[None], torch.arange(90)[None] % 4 - 1
    mask = ids[0][:, None, :, None] == ids[1][:, None, None]
    with engine(isa):
        found = cpu.decoding(q, k, v, scale=0.2, bias=bias, segments=ids)
    agree(found, formula(q, k, v, mask, 0.2, bias=bias), ERROR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), INF, -INF])
def test_poison_reaches_only_the_rows_that_see_it(engine: Callable, isa: str, dtype: str, poison: float) -> None:
    q, k, v = (
        draw(1, heads, rows, 64, seed=heads, dtype=DTYPES[dtype]) for heads, rows in ((4, 5), (2, 600), (2, 600))
    )
    with engine(isa):
        clean = cpu.decoding(q, k, v, scale=0.1, left=300, right=0)
        for x in (k, v):
            x[:, :, 597] = poison  # seen by queries 2, 3 and 4
            x[:, :, 100] = poison  # seen by nobody
        found = cpu.decoding(q, k, v, scale=0.1, left=300, right=0)
    for before, after in zip(clean, found, strict=True):
        assert torch.equal(before[:, :, :2], after[:, :, :2])
        assert not bool(after[:, :, 2:].isfinite().any()) or poison != poison  # noqa: PLR0124
    assert not bool(found[0][:, :, 2:].isfinite().any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_of_each_kind(engine: Callable, isa: str, dtype: str) -> None:
    q, k, v = (
        draw(2, heads, rows, 48, seed=heads, dtype=DTYPES[dtype]) for heads, rows in ((6, 7), (2, 700), (2, 700))
    )
    generator = torch.Generator().manual_seed(0)
    for heads, group, length in ((1, 1, 20), (2, 3, 600), (6, 7, 33)):
        lists = torch.rand(2, heads, -(-7 // group), 700, generator=generator).argsort(-1)[..., :length]
        lists = lists.masked_fill(torch.rand(lists.shape, generator=generator) < 0.3, -1)
        lists[0, 0, 0] = -1
        mask = torch.zeros(2, heads, lists.shape[2], 701, dtype=torch.bool)
        mask = mask.scatter(-1, lists.where(lists >= 0, 700), value=True)[..., :700]
        mask = mask.repeat_interleave(group, 2)[:, :, :7].repeat_interleave(6 // heads, 1) & band(7, 700, -1, 0)
        with engine(isa):
            found = cpu.decoding(q, k, v, scale=0.2, right=0, lists=lists, group=group)
        agree(found, formula(q, k, v, mask, 0.2), ERROR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_with_any_number_of_threads(dtype: str) -> None:
    q, k, v = (
        draw(1, heads, rows, 64, seed=heads, dtype=DTYPES[dtype]) for heads, rows in ((4, 2), (2, 5000), (2, 5000))
    )
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7, 1):
            torch.set_num_threads(threads)
            results.append(cpu.decoding(q, k, v, scale=0.1))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
