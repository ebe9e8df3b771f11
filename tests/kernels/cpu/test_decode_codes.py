"""The engine's products of bytes: codes with scales and zero points, against an fp64 formula written here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops import decode_attend
from saccade.types import KVPages

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Pages of codes as fp64 `[P, S, dim]`, channel by channel."""
    if codes.dtype == torch.uint8:
        codes = torch.cat([codes.int() % 16 - 8, codes.int() // 16 - 8], -1)
    group = torch.arange(codes.shape[-1]) // (codes.shape[-1] // scale.shape[-1])
    shift = 0.0 if zero is None else zero.double()[..., group]
    return (codes.double() - shift) * scale.double()[..., group]


def formula(q: Tensor, cache: KVPages) -> tuple[Tensor, Tensor, float]:
    """Out, lse, and what rounding may change: queries to 2^-15 of their greatest, weights to 2^-16 of a tile's."""
    keys = int(cache.lengths[0, 0])
    k, v = (
        plain(x, scale, zero)[cache.table].flatten(2, 3)[:, :, :keys]
        for x, scale, zero in ((cache.k, cache.k_scale, cache.k_zero), (cache.v, cache.v_scale, cache.v_zero))
    )
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    scores = q.double() @ k.mT * q.shape[3] ** -0.5
    place = torch.arange(q.shape[2])[:, None] + keys - q.shape[2]
    scores = scores.masked_fill(torch.arange(keys) > place, -torch.inf)
    score_error = q.shape[3] ** -0.5 * float(k.abs().sum(-1).max() * q.abs().max()) * 2.0**-15
    return (
        scores.softmax(-1) @ v,
        scores.logsumexp(-1),
        4e-6 + score_error + float(v.abs().max()) * (2 * score_error + 2.0**-15),
    )


def cache_of(
    keys: int, bits: int, group: int | None, dims: tuple[int, int], heads: int = 2, *, zero_point: bool = False
) -> KVPages:
    k, v = (draw(1, heads, keys, dim, seed=dim + keys) + 0.3 for dim in dims)
    return KVPages.from_dense(k, v, page_size=16, bits=bits, group=group, zero_point=zero_point)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize(
    ("dims", "group"), [((128, 128), None), ((128, 64), 64), ((256, 128), 128), ((64, 192), 32), ((96, 128), None)]
)
@pytest.mark.parametrize(("share", "queries", "keys"), [(1, 1, 5), (4, 1, 700), (3, 2, 131), (8, 1, 64), (4, 3, 300)])
def test_codes_agree_with_the_formula(
    engine: Callable,
    isa: str,
    bits: int,
    zero_point: bool,
    dims: tuple[int, int],
    group: int | None,
    share: int,
    queries: int,
    keys: int,
) -> None:
    cache = cache_of(keys, bits, group, dims, zero_point=zero_point)
    q = draw(1, 2 * share, queries, dims[0], seed=7)
    expected, lse, error = formula(q, cache)
    assert error < 0.02
    with engine(isa):
        found = decode_attend(q, cache, return_lse=True, impl="cpu")
    torch.testing.assert_close(found.out.double(), expected, rtol=0, atol=error)
    torch.testing.assert_close(found.lse.double(), lse, rtol=0, atol=error)


@pytest.mark.parametrize("bits", [8, 4])
def test_listed_codes_agree_with_the_formula(engine: Callable, isa: str, bits: int) -> None:
    cache, q = cache_of(600, bits, 64, (128, 128), heads=1), draw(1, 4, 1, 128, seed=1)
    chosen = torch.randperm(600, generator=torch.Generator().manual_seed(2))[:210].sort().values
    k, v = (
        plain(x, s, None)[cache.table].flatten(2, 3)[:, :, chosen]
        for x, s in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
    )
    expected = (q.double() @ k.mT * 128**-0.5).softmax(-1) @ v
    with engine(isa):
        found = decode_attend(q, cache, slots=chosen[None, None], impl="cpu")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=formula(q, cache)[2])


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_that_are_no_numbers_reach_those_who_see_them(engine: Callable, isa: str, bits: int) -> None:
    cache, q = cache_of(200, bits, None, (128, 128), heads=1), draw(1, 2, 2, 128, seed=3)
    before = formula(q, cache)
    last = int(cache.table[0, 0, 199 // 16]), 199 % 16
    for name in ("v_scale", "k_scale"):
        scale = getattr(cache, name).clone()
        scale[last] = torch.nan
        with engine(isa):
            found = decode_attend(q, replace(cache, **{name: scale}), impl="cpu").double()
        assert bool(found[:, :, 1].isnan().all())
        torch.testing.assert_close(found[:, :, 0], before[0][:, :, 0], rtol=0, atol=before[2])


def test_scales_below_zero_and_queries_that_are_no_numbers(engine: Callable, isa: str) -> None:
    cache, q = cache_of(150, 8, None, (128, 128), heads=1), draw(1, 3, 1, 128, seed=4)
    turned = replace(cache, k_scale=-cache.k_scale, v_scale=-cache.v_scale)
    with engine(isa):
        out = decode_attend(q, cache, impl="cpu")
        opposite = decode_attend(-q, turned, impl="cpu")
        q[0, 1, 0, 5] = torch.inf
        q[0, 2, 0, 9] = torch.nan
        spoilt = decode_attend(q, cache, impl="cpu")
    torch.testing.assert_close(opposite, -out, rtol=0, atol=formula(draw(1, 3, 1, 128, seed=4), cache)[2])
    torch.testing.assert_close(spoilt[:, 0], out[:, 0], rtol=0, atol=1e-4)
    assert bool(spoilt[:, 1:].isnan().all())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_same_bits_with_any_number_of_threads(bits: int) -> None:
    cache, q = cache_of(3000, bits, 64, (128, 128), zero_point=True), draw(1, 8, 1, 128, seed=5)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            outs.append(decode_attend(q, cache, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
