"""The engine's attention over lists against an fp64 formula written here: shapes, storages, poison, bounds, threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops import decode_attend
from saccade.types import KVPages

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}"),
]

INF = float("inf")
ERROR = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Weights and sums are fp32; halves round the outputs once."""
SHAPES = [  # batch, heads, kv_heads, list_heads, queries, group, keys, dim, value_dim, slots
    (1, 4, 1, 1, 1, 1, 40, 16, 16, 7),
    (2, 6, 2, 2, 3, 1, 90, 64, 80, 33),
    (1, 8, 2, 8, 2, 1, 70, 128, 32, 64),
    (2, 5, 1, 1, 5, 3, 50, 48, 96, 20),
    (1, 7, 1, 1, 2, 2, 1300, 32, 48, 1100),
]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and lists with a fifth of the slots empty, the first list wholly so."""
    batch, heads, kv_heads, list_heads, queries, group, keys, dim, value_dim, slots = shape
    q, k, v = (
        draw(batch, h, n, d, seed=seed, dtype=dtype)
        for seed, (h, n, d) in enumerate(((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)))
    )
    noise = torch.rand(batch, list_heads, -(-queries // group), keys, generator=torch.Generator().manual_seed(3))
    lists = noise.argsort(-1)[..., :slots]
    lists = torch.where(lists % 5 == 0, -1, lists)
    lists[0, 0, 0] = -1
    return q, k, v, lists


def formula(q, k, v, lists, scale, group, causal=False, softcap=None, sinks=None):  # noqa: ANN001, ANN201
    """Dense in fp64, with a mask; what no list holds is replaced by 0."""
    batch, heads, queries, _ = q.shape
    keys, share = k.shape[2], heads // k.shape[1]
    mask = torch.zeros(*lists.shape[:3], keys + 1, dtype=torch.bool)
    mask.scatter_(-1, torch.where(lists < 0, keys, lists), value=True)
    mask = mask[..., :keys].repeat_interleave(group, 2)[:, :, :queries]
    mask = mask.repeat_interleave(heads // mask.shape[1], 1).expand(batch, -1, -1, -1)
    if causal:
        mask = mask & (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries)
    q, k, v = q.double(), k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    scores = (q @ k.nan_to_num(0, 0, 0).mT) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -INF)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None].expand_as(lse))
    weights = torch.exp(scores - lse.masked_fill(lse == -INF, 0.0)[..., None])
    return weights @ v.nan_to_num(0, 0, 0), lse


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert found[0].dtype == dtype
    assert torch.equal(found[1] == -INF, expected[1] == -INF)
    unit = ERROR[dtype]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=unit, atol=4e-6)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_are_those_of_the_formula(
    engine: Callable, isa: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    q, k, v, lists = problem(shape, dtype)
    group = shape[5]
    sinks = draw(q.shape[1], seed=5)
    rules = [{}, {"softcap": 1.5}, {"sinks": sinks}, {"sinks": sinks, "softcap": 1.5}]
    rules += [{"causal": True}] if group == 1 else []
    with engine(isa):
        for options in rules:
            assert cpu.gathers(q, k.shape[1], v.shape[3], lists, group, options.get("causal", False))
            found = cpu.gathering(q, k, v, lists, scale=0.3, group=group, **options)
            agree(found, formula(q, k, v, lists, 0.3, group, **options), dtype)
            assert bool((found[0][0, 0, 0] == 0).all())


def test_scores_of_any_size_keep_their_order(engine: Callable, isa: str) -> None:
    """The greatest score comes last, or first, and is hundreds above the others."""
    q, k, v = torch.ones(1, 3, 1, 16), torch.zeros(1, 1, 64, 16), draw(1, 1, 64, 16, seed=1)
    with engine(isa):
        for at, height in ((63, 40.0), (0, 40.0), (31, -40.0)):
            k.zero_()[:, :, at] = height
            lists = torch.arange(64).view(1, 1, 1, 64)
            agree(cpu.gathering(q, k, v, lists, scale=1.0), formula(q, k, v, lists, 1.0, 1), torch.float32)


@pytest.mark.parametrize("bad", [torch.nan, INF, -INF])
def test_poison_stays_with_the_queries_that_list_it(engine: Callable, isa: str, bad: float) -> None:
    q, k, v, lists = problem((1, 4, 1, 1, 3, 1, 90, 32, 32, 20))
    lists = torch.where(lists == 89, -1, lists)
    lists[0, 0, 2, 5] = 89
    for x in (k, v):
        x[:, :, 89] = bad
    with engine(isa):
        early, hidden = q[:, :, :2], lists[:, :, :2].clone()
        hidden[0, 0, 0, 0] = 89  # what comes after the first of two queries
        found = cpu.gathering(early, k, v, hidden, scale=0.3, causal=True)
        agree(found, formula(early, k, v, hidden, 0.3, 1, causal=True), torch.float32)
        assert bool(found[0].isfinite().all())
        seen = cpu.gathering(q, k, v, lists, scale=0.3)[0]
        assert bool(seen[:, :, :2].isfinite().all())
        assert not bool(seen[:, :, 2].isfinite().any())


def test_lists_that_point_outside_are_refused(engine: Callable, isa: str) -> None:
    q, k, v, lists = problem(SHAPES[4])
    with engine(isa):
        for wrong in (1300, -2, 2**62):
            broken = lists.clone()
            broken[0, 0, 0, 900] = wrong
            with pytest.raises(ValueError, match=r"index.indices in \[-.*\]: expected -1 or positions in \[0, 1300\)"):
                cpu.gathering(q, k, v, broken, scale=0.3, group=2)


def test_what_it_does_not_serve_it_says() -> None:
    q, k, v, lists = problem((1, 4, 2, 2, 2, 1, 30, 32, 32, 9))
    assert cpu.gathers(q, 2, 32, lists, 1, causal=True)
    assert not cpu.gathers(q, 2, 32, lists, 2, causal=True)
    assert not cpu.gathers(q, 2, 32, lists, 9, causal=False)
    assert not cpu.gathers(q[..., :31], 2, 32, lists, 1, causal=False)
    assert not cpu.gathers(q, 2, 24, lists, 1, causal=False)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_pages_give_the_bits_that_tensors_give(engine: Callable, isa: str, dtype: torch.dtype, page_size: int) -> None:
    """Pages in any order, those of keys and of values apart, with poison wherever nothing is stored."""
    q, k, v, lists = problem((2, 6, 3, 3, 1, 1, 150, 32, 48, 130), dtype)
    lengths = torch.tensor([[150, 0, 64], [1, 149, 97]])
    stored = torch.arange(150) < lengths[..., None]
    entries = -(-150 // page_size)
    generator, token = torch.Generator().manual_seed(8), torch.arange(150)
    tables, paged = [], []
    for x in (k, v):
        table = torch.randperm(6 * entries + 3, generator=generator)[: 6 * entries].view(2, 3, -1)
        pages = torch.full((6 * entries + 3, page_size, 2 * x.shape[3]), torch.nan, dtype=dtype)[..., : x.shape[3]]
        pages[table[:, :, token // page_size], token % page_size] = x.masked_fill(~stored[..., None], torch.nan)
        tables.append(table)
        paged.append(pages)
    cache = cpu.Pages(tables[1], lengths, 150, (32, 48), key_table=tables[0])
    seen = lists.masked_fill(~stored[:, :, None].expand(-1, -1, 1, -1).gather(3, lists.clamp(min=0)), -1)
    with engine(isa):
        wanted = cpu.gathering(q, k, v, seen, scale=0.3)
        agree(wanted, formula(q, k, v, seen, 0.3, 1), dtype)
        found = cpu.gathering(q, *paged, lists, scale=0.3, pages=cache)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert bool((wanted[1][0, 2:4] == -INF).all())


def test_decoding_takes_this_kernel_where_one_query_sees_all_that_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list may name what is not stored; windows, several queries and codes are for the general one."""
    q, k, v, _ = problem((1, 4, 2, 2, 2, 1, 60, 32, 32, 9))
    cache = KVPages(k[0].clone(), v[0].clone(), torch.tensor([[[0], [1]]]), torch.tensor([[60, 50]]))
    slots = torch.tensor([[[3, -1, 59, 55, 0], [49, 50, 59, -1, 1]]])
    taken = []
    monkeypatch.setattr(cpu, "gathering", lambda *args, **rules: taken.append(1) or gathering(*args, **rules))
    gathering = cpu.gather.gathering
    for rows, rules, kernel in ((q[:, :, :1], {}, 1), (q[:, :, :1], {"window": (20, 0)}, 0), (q, {}, 0)):
        taken.clear()
        found = decode_attend(rows, cache, slots=slots, impl="cpu", return_lse=True, **rules)
        wanted = decode_attend(rows, cache, slots=slots, impl="reference", return_lse=True, **rules)
        assert len(taken) == kernel
        torch.testing.assert_close(found.out, wanted.out)
        torch.testing.assert_close(found.lse, wanted.lse)


def test_strides_sharing_and_threads_change_no_bit(engine: Callable) -> None:
    q, k, v, lists = problem((2, 8, 2, 2, 3, 1, 2100, 64, 64, 2000))
    plain = cpu.gathering(q, k, v, lists, scale=0.3)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, lists)]
    results = [cpu.gathering(*moved, scale=0.3)]
    for count in (1, 2, 7):
        with engine(threads=count):
            results.append(cpu.gathering(q, k, v, lists, scale=0.3))
    for other in results:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    shared = lists[:1, :1]
    spread = shared.expand(2, 2, -1, -1).contiguous()
    for a, b in zip(cpu.gathering(q, k, v, shared, scale=0.3), cpu.gathering(q, k, v, spread, scale=0.3), strict=True):
        assert torch.equal(a, b)


def test_many_lists_give_the_bits_that_few_give(engine: Callable, isa: str) -> None:
    """Of many lists each thread takes whole ones, of few their stretches are shared out."""
    q, k, v, lists = problem((1, 4, 1, 1, 131, 1, 1500, 32, 48, 1100))
    outside = lists.clone()
    outside[0, 0, 130, 1099] = 1500
    with engine(isa):
        many = cpu.gathering(q, k, v, lists, scale=0.3)
        agree(many, formula(q, k, v, lists, 0.3, 1), torch.float32)
        few = cpu.gathering(q[:, :, 120:], k, v, lists[:, :, 120:], scale=0.3)
        assert all(torch.equal(x[:, :, 120:], y) for x, y in zip(many, few, strict=True))
        with pytest.raises(ValueError, match=r"index.indices in \[-1, 1500\]: expected -1 or positions in \[0, 1500\)"):
            cpu.gathering(q, k, v, outside, scale=0.3)
