"""Scores of few queries over pages against the formula written here: storages, lengths, instruction sets, threads."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops import decode_scores
from saccade.types import KVPages

pytestmark = pytest.mark.quick

INF = float("inf")
needs_engine = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")
LENGTHS = ((150, 70, 3), (2, 0, 64))
SIZES = {"pages": (128, 64), "odd": (30, 7)} if "SACCADE_SANITIZED" in os.environ else {
    "pages": (128, 64), "half": (64, 64), "tail": (40, 16), "odd": (30, 7)
}  # fmt: skip


def problem(dim: int, page: int, queries: int, dtype: torch.dtype, bits: int | None) -> tuple[Tensor, KVPages]:
    generator = torch.Generator().manual_seed(dim + queries)
    k, v = (torch.randn(2, 3, 150, size, generator=generator).to(dtype) for size in (dim, 4))
    cache = KVPages.from_dense(k, v, lengths=torch.tensor(LENGTHS), page_size=page, bits=bits, zero_point=bits == 4)
    return torch.randn(2, 6, queries, dim, generator=generator).to(dtype), cache


def formula(q: Tensor, cache: KVPages, scale: float) -> Tensor:
    """One query and one key at a time; a query sees keys up to its own place, counted from its head's end."""
    keys = cache.to_dense(torch.float64)[0]
    out = torch.full((*q.shape[:3], keys.shape[2]), -INF, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            length = LENGTHS[b][h // 2]
            for i in range(q.shape[2]):
                for j in range(length - q.shape[2] + i + 1):
                    out[b, h, i, j] = scale * (q[b, h, i].double() * keys[b, h // 2, j]).sum()
    return out


@pytest.mark.parametrize("impl", ["cpu", "eager", "reference"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_formula(impl: str, size: str, bits: int | None, dtype: torch.dtype) -> None:
    if impl == "cpu" and cpu.missing() is not None:
        pytest.skip(f"no C++ engine: {cpu.missing()}")
    dim, page = SIZES[size]
    q, cache = problem(dim, page, 1 if size == "half" else 3, dtype, bits)
    expected = formula(q, cache, 0.3)
    for name in cpu.INSTRUCTION_SETS if impl == "cpu" else [None]:
        if name is not None and cpu.use(name) is None:
            continue
        try:
            found = decode_scores(q, cache, scale=0.3, impl=impl)
        finally:
            if name is not None:
                cpu.use(None)
        assert found.dtype == torch.float32
        assert torch.equal(found == -INF, expected == -INF)
        seen = expected > -INF
        torch.testing.assert_close(found[seen].double(), expected[seen], rtol=1e-6, atol=1e-5)


@needs_engine
def test_threads_and_strides_change_no_bit() -> None:
    q, cache = problem(64, 16, 2, torch.bfloat16, None)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            found.append(decode_scores(q, cache, impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    apart = torch.stack([cache.k, cache.k], 2).flatten(1, 2)[:, ::2]
    found.append(decode_scores(q.transpose(1, 2).contiguous().transpose(1, 2), replace(cache, k=apart), impl="cpu"))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("impl", ["cpu", "eager"])
def test_what_is_not_seen_may_be_anything(impl: str) -> None:
    if impl == "cpu" and cpu.missing() is not None:
        pytest.skip(f"no C++ engine: {cpu.missing()}")
    q, cache = problem(64, 16, 2, torch.float32, None)
    clean = decode_scores(q, cache, impl=impl)
    poisoned = cache.k.clone()
    poisoned[int(cache.table[0, 1, 69 // 16]), 69 % 16] = torch.nan  # the last of head 1: only its last query sees it
    poisoned[int(cache.table[0, 2, 0]), 3:] = torch.nan  # past the end of head 2
    found = decode_scores(q, replace(cache, k=poisoned), impl=impl)
    assert bool(found[0, 2:4, 1, 69].isnan().all())
    found[0, 2:4, 1, 69] = clean[0, 2:4, 1, 69]
    assert torch.equal(found, clean)


def test_nothing_stored() -> None:
    q = torch.randn(1, 2, 1, 4)
    cache = KVPages.from_dense(torch.zeros(1, 1, 0, 4), torch.zeros(1, 1, 0, 4))
    assert decode_scores(q, cache).shape == (1, 2, 1, 0)


def test_refusals() -> None:
    q, cache = problem(30, 7, 1, torch.float32, None)
    with pytest.raises(ValueError, match=r"cache with head dim 30: expected 29, that of q"):
        decode_scores(q[..., :29], cache)
    with pytest.raises(ValueError, match=r"impl='fast': decode_scores has 'auto', 'cpu', 'eager', 'reference'"):
        decode_scores(q, cache, impl="fast")
    with pytest.raises(ValueError, match=r"table has page 999: expected pages in \[0, "):
        decode_scores(q, replace(cache, table=torch.full_like(cache.table, 999)))


@pytest.mark.parametrize("impl", ["cpu", "eager", "reference"])
def test_a_table_of_keys_is_read(impl: str) -> None:
    if impl == "cpu" and cpu.missing() is not None:
        pytest.skip(f"no C++ engine: {cpu.missing()}")
    q, cache = problem(64, 64, 1, torch.float32, None)
    cache = replace(cache, lengths=torch.full((2, 3), 150), table=torch.arange(18).view(2, 3, 3))
    shared = cache.table[:, [0, 0, 2]]
    expected = decode_scores(q, replace(cache, table=shared), impl=impl)
    torch.testing.assert_close(decode_scores(q, replace(cache, key_table=shared), impl=impl), expected, rtol=0, atol=0)
