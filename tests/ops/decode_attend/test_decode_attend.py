"""`decode_attend` over every kind of cache against an fp64 formula over the stored values, taken apart by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops import attend, decode_attend, recording
from saccade.types import KVPages

INF = float("inf")
native = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")
IMPLS = ["eager", "reference", pytest.param("cpu", marks=native)]
LENGTHS = torch.tensor([[70, 5], [33, 0]])


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(bits: int | None = None, group: int | None = None, *, zero_point: bool = False, page: int | None = 16,
           dtype: torch.dtype = torch.float32, dims: tuple[int, int] = (32, 64)) -> KVPages:  # fmt: skip
    """Ragged, its pages in a shuffled order, and everything that no head owns poisoned."""
    k, v = (draw(2, 2, 70, dim, seed=dim, dtype=dtype) + 0.5 for dim in dims)
    cache = KVPages.from_dense(
        k, v, lengths=LENGTHS, page_size=page, bits=bits, group=group, zero_point=zero_point
    )  # fmt: skip
    order = torch.randperm(len(cache.k), generator=torch.Generator().manual_seed(1))
    names = ("k", "v", "k_scale", "v_scale", "k_zero", "v_zero")
    parts = {name: getattr(cache, name)[order] for name in names if getattr(cache, name) is not None}
    cache = replace(cache, **parts, table=order.argsort()[cache.table])
    owned = torch.zeros(cache.k.shape[:2], dtype=torch.bool)
    for b in range(2):
        for g in range(2):
            for j in range(int(LENGTHS[b, g])):
                owned[cache.table[b, g, j // cache.page_size], j % cache.page_size] = True
    for name in names if bits is None else names[2:]:
        if getattr(cache, name) is not None:
            getattr(cache, name)[~owned] = float("nan")
    used = torch.arange(cache.table.shape[2]) * cache.page_size < LENGTHS[..., None]
    return replace(cache, table=cache.table.where(used, 10**6))


@lru_cache(maxsize=4096)
def token(cache: KVPages, name: str, b: int, g: int, j: int) -> Tensor:
    """One key or value, fp64."""
    at = int(cache.table[b, g, j // cache.page_size]), j % cache.page_size
    row, scale, zero = (getattr(cache, name + part) for part in ("", "_scale", "_zero"))
    if scale is None:
        return row[at].double()
    codes = row[at].tolist()
    if row.dtype == torch.uint8:
        codes = [code % 16 - 8 for code in codes] + [code // 16 - 8 for code in codes]
    group = len(codes) // scale.shape[2]
    values = []
    for i, code in enumerate(codes):
        shift = 0.0 if zero is None else float(zero[at][i // group])
        values.append((code - shift) * float(scale[at][i // group]))
    return torch.tensor(values, dtype=torch.float64)


def oracle(q: Tensor, cache: KVPages, left: int, right: int, softcap: float | None, scale: float):  # noqa: ANN201
    batch, heads, queries, _ = q.shape
    out = torch.zeros(batch, heads, queries, cache.dims[1], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -INF, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // 2)
            length = int(LENGTHS[b, g])
            keys = [token(cache, "k", b, g, j) for j in range(length)]
            values = [token(cache, "v", b, g, j) for j in range(length)]
            for i in range(queries):
                place = i + length - queries
                seen = [
                    j for j in range(length)
                    if (left < 0 or j >= place - left) and (right < 0 or j <= place + right)
                ]  # fmt: skip
                if not seen:
                    continue
                scores = torch.stack([q[b, h, i].double() @ keys[j] for j in seen]) * scale
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                lse[b, h, i] = scores.logsumexp(0)
                out[b, h, i] = torch.softmax(scores, 0) @ torch.stack([values[j] for j in seen])
    return out, lse


CACHES = {
    "fp32": {}, "bf16": {"dtype": torch.bfloat16}, "fp16": {"dtype": torch.float16}, "one page": {"page": None},
    "odd dims": {"dims": (17, 3)}, "int8": {"bits": 8}, "int8 groups": {"bits": 8, "group": 16, "zero_point": True},
    "int8 odd": {"bits": 8, "dims": (33, 12)}, "int4": {"bits": 4}, "int4 groups": {"bits": 4, "group": 32},
    "int4 narrow": {"bits": 4, "group": 2, "zero_point": True, "dims": (40, 20)},
    "int8 in registers": {"bits": 8, "group": 16, "dims": (64, 48)},
    "int4 in registers": {"bits": 4, "group": 16, "dims": (96, 64)},
}  # fmt: skip
RULES = [
    {"causal": True}, {"causal": False}, {"causal": True, "window": (9, -1), "softcap": 1.5},
    {"causal": False, "window": (20, 1)},
]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", CACHES)
def test_every_cache_agrees_with_the_oracle(kind: str, impl: str) -> None:
    cache = stored(**CACHES[kind])
    for queries, rules in zip((1, 3, 4, 6), RULES, strict=True):
        for dtype in [cache.k.dtype] if cache.bits is None else [torch.float32, torch.bfloat16]:
            q = draw(2, 6, queries, cache.dims[0], seed=queries, dtype=dtype)
            left, right = rules.get("window", (-1, -1))
            expected = oracle(q, cache, left, 0 if rules["causal"] else right, rules.get("softcap"), 0.2)
            error = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
            error += 1e-4 if impl == "cpu" and cache.bits else 0.0  # queries of 15 bits, weights of 16
            for isa in cpu.INSTRUCTION_SETS if impl == "cpu" else [None]:
                if isa is not None and cpu.use(isa) is None:
                    continue
                try:
                    found = decode_attend(q, cache, **rules, scale=0.2, return_lse=True, workspace=20_000, impl=impl)
                finally:
                    if isa is not None:
                        cpu.use(None)
                assert found.out.dtype == dtype
                torch.testing.assert_close(found.out.double(), expected[0], rtol=0, atol=error)
                torch.testing.assert_close(found.lse.double(), expected[1], rtol=0, atol=error)


def with_shared_keys(kind: str) -> KVPages:
    """The second head of each sequence reads the first's keys, which lie on fewer pages of their own."""
    cache = stored(**CACHES[kind])
    rows = cache.table[:, :1].masked_fill(cache.table[:, :1] > len(cache.k), 0)
    pages = rows.flatten().unique().flip(0)
    place = torch.zeros(len(cache.k), dtype=torch.int64)
    place[pages] = torch.arange(len(pages))
    keys = {
        name: getattr(cache, name)[pages] for name in ("k", "k_scale", "k_zero") if getattr(cache, name) is not None
    }
    return replace(cache, **keys, key_table=place[rows].expand(-1, 2, -1))


@pytest.mark.quick
@pytest.mark.parametrize("listed", [0, 2, 6])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "odd dims", "int8 groups", "int4 in registers"])
def test_heads_that_share_keys(kind: str, impl: str, listed: int) -> None:
    plain, cache = stored(**CACHES[kind]), with_shared_keys(kind)
    q = draw(2, 6, 1, cache.dims[0], seed=4, dtype=torch.float32 if cache.bits else cache.k.dtype)
    slots = (
        None if not listed else torch.stack([torch.randperm(70)[:30] for _ in range(2 * listed)]).view(2, listed, 30)
    )
    expected = torch.zeros(2, 6, 1, cache.dims[1], dtype=torch.float64)
    for b in range(2):
        for h in range(6):
            length = int(LENGTHS[b, h // 3])
            seen = range(length) if slots is None else slots[b, h * listed // 6].tolist()
            seen = [j for j in seen if j < length]
            if seen:
                scores = torch.stack([q[b, h, 0].double() @ token(plain, "k", b, 0, j) for j in seen]) * 0.2
                expected[b, h, 0] = torch.softmax(scores, 0) @ torch.stack(
                    [token(plain, "v", b, h // 3, j) for j in seen]
                )
    for isa in cpu.INSTRUCTION_SETS if impl == "cpu" else [None]:
        if isa is not None and cpu.use(isa) is None:
            continue
        try:
            found = decode_attend(q, cache, slots=slots, scale=0.2, impl=impl)
        finally:
            if isa is not None:
                cpu.use(None)
        error = 4e-2 if q.dtype == torch.bfloat16 else 1.2e-4 if cache.bits else 2e-5
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=error)


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
def test_a_full_cache_is_attend(impl: str) -> None:
    q, k, v = draw(2, 4, 3, 32, seed=0), draw(2, 2, 50, 32, seed=1), draw(2, 2, 50, 16, seed=2)
    found = decode_attend(q, KVPages.from_dense(k, v, page_size=8), return_lse=True, impl=impl)
    expected = attend(q, k, v, causal=True, return_lse=True, impl="eager")
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=0, atol=2e-6)


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
def test_a_seen_poison_is_seen_and_a_hidden_one_is_not(impl: str) -> None:
    q, k, v = draw(1, 2, 4, 16, seed=0), draw(1, 1, 30, 16, seed=1), draw(1, 1, 30, 16, seed=2)
    clean = decode_attend(q, KVPages.from_dense(k, v), impl=impl)
    for x in (k, v):
        x[:, :, 28] = float("nan")
    found = decode_attend(q, KVPages.from_dense(k, v), impl=impl)
    torch.testing.assert_close(found[:, :, :2], clean[:, :, :2], rtol=0, atol=1e-6)
    assert bool(found[:, :, 2:].isnan().all())


@native
@pytest.mark.quick
def test_the_engine_is_chosen_and_says_when_it_cannot() -> None:
    cache = stored(8)
    q = draw(2, 4, 2, 32, seed=0)
    with recording() as records:
        decode_attend(q, cache)
    assert (records[0].op, records[0].impl, records[0].refused) == ("decode_attend", "cpu", {})
    with pytest.raises(ValueError, match=r"impl='cpu': decode_attend cannot run it here: .* q is fp64"):
        decode_attend(q.double(), cache, impl="cpu")


@pytest.mark.quick
def test_there_is_no_backward_and_it_says_so() -> None:
    q = draw(2, 4, 2, 32, seed=0).requires_grad_()
    out = decode_attend(q, stored())
    with pytest.raises(RuntimeError, match="decode_attend has no backward: use attend"):
        out.sum().backward()


@pytest.mark.parametrize("impl", ["eager", pytest.param("cpu", marks=native)])
@pytest.mark.parametrize("bits", [None, 4])
def test_opcheck_and_compile(bits: int | None, impl: str) -> None:
    cache, q = stored(bits), draw(2, 4, 2, 32, seed=0)
    arguments = (cache.k, cache.v, cache.table, cache.lengths, cache.k_scale, cache.v_scale, cache.k_zero, cache.v_zero)
    torch.library.opcheck(
        torch.ops.saccade.decode_attend.default, (q, *arguments, -1, 0, None, 0.2, 2**20, impl),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip
    compiled = torch.compile(lambda q: decode_attend(q, cache, impl=impl), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), decode_attend(q, cache, impl=impl), rtol=0, atol=0)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": torch.zeros(2, 4, 32)}, r"q of shape \(2, 4, 32\) and dtype torch.float32: expected floating point"),
        ({"q": torch.zeros(2, 3, 1, 32)}, r"cache.table of shape \(2, 2, 5\): expected batch 2 and a divisor of q's 3"),
        ({"q": torch.zeros(2, 4, 1, 16)}, "cache with head dim 32: expected 16, that of q"),
        ({"q": torch.zeros(2, 4, 1, 32).half()}, "cache.k is torch.float32 on cpu: expected torch.float16 on cpu"),
        ({"cache": 1}, "cache of type int: expected a KVPages"),
        ({"window": (1,)}, r"window=\(1,\): expected \(left, right\)"),
        ({"softcap": 0.0}, "softcap=0.0: expected a finite number above 0"),
        ({"impl": "fast"}, "impl='fast': decode_attend has 'auto', 'cpu', 'eager', 'reference'"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(bad: dict, message: str) -> None:
    call = {"q": torch.zeros(2, 4, 1, 32), "cache": stored()} | bad
    with pytest.raises(ValueError, match=message):
        decode_attend(call.pop("q"), call.pop("cache"), **call)


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
def test_a_table_that_points_outside_is_refused(impl: str) -> None:
    cache = stored()
    q = draw(2, 4, 1, 32, seed=0)
    with pytest.raises(ValueError, match=r"table has page 1000000: expected pages in \[0, 20\)"):
        decode_attend(q, replace(cache, lengths=torch.full((2, 2), 70)), impl=impl)
    with pytest.raises(ValueError, match=r"lengths in \[0, 99\]: expected \[0, 80\]"):
        decode_attend(q, replace(cache, lengths=torch.tensor([[99, 1], [1, 0]])), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(("lists", "queries"), [(2, 1), (4, 1), (2, 3), (4, 3)])
def test_listed_slots_and_no_others(impl: str, bits: int | None, lists: int, queries: int) -> None:
    cache, q = stored(bits), draw(2, 4, queries, 32, seed=9)
    generator = torch.Generator().manual_seed(lists)
    slots = torch.stack([torch.randperm(90, generator=generator)[:40] for _ in range(2 * lists)]).view(2, lists, 40)
    slots[slots % 5 == 0] = -1
    k, v = (x.double() for x in cache.to_dense())
    mask = torch.zeros(2, 4, queries, 70, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            length = int(LENGTHS[b, h // 2])
            for i in range(queries):
                seen = [j for j in slots[b, h * lists // 4].tolist() if 0 <= j <= i + length - queries]
                mask[b, h, i, seen] = True
    scores = (q.double() @ k.repeat_interleave(2, 1).mT * 32**-0.5).masked_fill(~mask, -INF)
    expected = scores.softmax(-1).nan_to_num() @ v.repeat_interleave(2, 1)
    out, lse = decode_attend(q, cache, slots=slots, return_lse=True, impl=impl)
    error = 1e-4 if impl == "cpu" and bits else 1e-5  # weights of 16 bits
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=error)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)
    nothing = decode_attend(q, cache, slots=slots[..., :0], return_lse=True, impl="auto")
    assert not bool(nothing.out.any())
    assert bool((nothing.lse == -INF).all())


def test_bad_slots() -> None:
    cache, q = stored(), draw(2, 4, 1, 32, seed=9)
    with pytest.raises(ValueError, match=r"slots of shape \(2, 3, 5\): expected \[2, 2 or 4, K\]"):
        decode_attend(q, cache, slots=torch.zeros(2, 3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="slots of torch.int32 on cpu: expected torch.int64 on cpu"):
        decode_attend(q, cache, slots=torch.zeros(2, 2, 5, dtype=torch.int32))
