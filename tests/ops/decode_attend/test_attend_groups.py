"""Attention over packed groups against loops that take every code from its byte: bits, sizes, instruction sets."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops import attend_groups
from saccade.types.groups import KVGroups, spread_codes, squeeze_codes

pytestmark = pytest.mark.quick

INF, NAN = float("inf"), float("nan")
needs_engine = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")
LENGTHS = ((5, 2), (0, 3))
"""Groups of each head."""

SHAPES = {  # bits, tokens of a group, D, E, channels, query heads of a key/value head, queries, a norm, a cap
    "kivi": (2, 32, 64, 128, 32, 4, 1, False, None),
    "kivi4": (4, 32, 128, 64, 32, 2, 2, False, 3.0),
    "zipcache": (4, 60, 32, 48, 48, 3, 1, True, None),
    "odd": (2, 7, 16, 16, 16, 1, 1, True, 5.0),
    "bytes": (8, 18, 32, 80, 16, 1, 3, False, None),
}
each_shape = pytest.mark.parametrize(
    "shape", ("kivi4", "odd", "bytes") if "SACCADE_SANITIZED" in os.environ else tuple(SHAPES)
)


def problem(shape: str, dtype: torch.dtype = torch.float32, heads: int = 2) -> tuple[Tensor, KVGroups]:
    """Groups in any order in memory that holds others too, one after the other on their page; any bytes are codes."""
    bits, size, dim, value_dim, channels, share, queries, normed, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(dim + size)
    count = 12

    def page(width: int, *, low: float = 0.0, high: float = 1.0) -> Tensor:
        apart = torch.rand(count, width + 3, generator=generator) * (high - low) + low
        return apart.to(dtype)[:, :width]

    def codes(width: int) -> Tensor:
        return torch.randint(0, 256, (count, width + 5), generator=generator, dtype=torch.uint8)[:, :width]

    top, shares = 2**bits - 1, size * (value_dim // channels)
    groups = KVGroups(
        codes(size * dim * bits // 8), page(dim, high=2 / top), page(dim, low=-1.5, high=0.0),
        codes(size * value_dim * bits // 8), page(shares, high=2 / top), page(shares, low=-1.5, high=0.0),
        page(value_dim, low=0.5, high=2.0) if normed else None,
        torch.randperm(count, generator=generator)[: 6 * heads].view(2, heads, 3).repeat(1, 1, 2)[..., :5],
        torch.tensor(LENGTHS)[:, :heads], bits, size,
    )  # fmt: skip
    q = torch.randn(2, queries, share * heads, dim, generator=generator).to(dtype).transpose(1, 2)
    return 2 * q, groups


def widened(groups: KVGroups, group: int) -> tuple[Tensor, Tensor]:
    """Keys `[S, D]` and values `[S, E]` of a group, number by number."""
    (dim, value_dim), size, bits = groups.dims, groups.size, groups.bits
    share = groups.value_scale.shape[1] // size
    key, value = groups.key[group].tolist(), groups.value[group].tolist()
    low, scale = groups.key_low[group].tolist(), groups.key_scale[group].tolist()
    value_low, value_scale = groups.value_low[group].tolist(), groups.value_scale[group].tolist()
    norm = [1.0] * value_dim if groups.value_norm is None else groups.value_norm[group].tolist()

    def code(packed: list[int], number: int) -> int:
        return packed[number % len(packed)] >> bits * (number // len(packed)) & (2**bits - 1)

    k = [[low[c] + code(key, j * dim + c) * scale[c] for c in range(dim)] for j in range(size)]
    v = []
    for j in range(size):
        v.append([])
        for e in range(value_dim):
            place = j * share + e * share // value_dim
            v[j].append((value_low[place] + code(value, j * value_dim + e) * value_scale[place]) * norm[e])
    return torch.tensor(k, dtype=torch.float64), torch.tensor(v, dtype=torch.float64)


def formula(q: Tensor, groups: KVGroups, softcap: float | None) -> tuple[Tensor, Tensor]:
    share = q.shape[1] // groups.table.shape[1]
    out = torch.zeros(*q.shape[:3], groups.dims[1], dtype=torch.float64)
    lse = torch.full(q.shape[:3], -INF, dtype=torch.float64)
    for b in range(q.shape[0]):
        for g in range(groups.table.shape[1]):
            pairs = [widened(groups, int(groups.table[b, g, n])) for n in range(int(groups.lengths[b, g]))]
            if not pairs:
                continue
            k, v = (torch.cat(x) for x in zip(*pairs, strict=True))
            for h in range(g * share, (g + 1) * share):
                scores = q[b, h].double() @ k.mT / math.sqrt(q.shape[3])
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                out[b, h], lse[b, h] = scores.softmax(-1) @ v, scores.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("impl", ["eager", "reference", *(f"cpu {name}" for name in cpu.INSTRUCTION_SETS)])
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_formula(impl: str, shape: str, dtype: torch.dtype, engine: Callable) -> None:
    if impl.startswith("cpu") and cpu.missing() is not None:
        pytest.skip(f"no C++ engine: {cpu.missing()}")
    q, groups = problem(shape, dtype)
    softcap = SHAPES[shape][-1]
    expected, expected_lse = formula(q, groups, softcap)
    if impl.startswith("cpu"):
        with engine(impl.split()[1]):
            out, lse = attend_groups(q, groups, softcap=softcap, impl="cpu")
    else:
        out, lse = attend_groups(q, groups, softcap=softcap, impl=impl)
    assert out.dtype == dtype
    assert lse is not None
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=4e-6)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=2e-5 + rounding)


@needs_engine
@each_shape
def test_what_no_head_has_is_not_looked_at(shape: str) -> None:
    """Groups that no table names are poison, and entries past a head's length are numbers of no group."""
    q, groups = problem(shape)
    clean, _ = attend_groups(q, groups, impl="cpu")
    used = torch.arange(groups.table.shape[2]) < groups.lengths[..., None]
    unused = torch.ones(len(groups.key), dtype=torch.bool)
    unused[groups.table[used]] = False
    assert bool(unused.any())
    names = ("key_scale", "key_low", "value_scale", "value_low")
    poisoned = {name: getattr(groups, name).clone() for name in names}
    for x in poisoned.values():
        x[unused] = NAN
    table = groups.table.masked_fill(~used, -(10**9))
    found, _ = attend_groups(q, replace(groups, table=table, **poisoned), impl="cpu")
    torch.testing.assert_close(found, clean, rtol=0, atol=0)


@needs_engine
def test_cuts_and_threads(engine: Callable) -> None:
    """Many groups in several cuts, heads of different lengths: the formula, and the same bits on 1, 2 and 7 threads."""
    q, groups = problem("kivi")
    table = groups.table.repeat(1, 1, 40)
    groups = replace(groups, table=table, lengths=torch.tensor([[200, 17], [0, 131]]))
    k, v = groups.to_dense(torch.float64)
    share = q.shape[1] // 2
    scores = q.double() @ k.repeat_interleave(share, 1).mT * q.shape[3] ** -0.5
    there = torch.arange(k.shape[2]) < (groups.lengths * groups.size)[..., None]
    scores = scores.masked_fill(~there.repeat_interleave(share, 1)[:, :, None], -INF)
    expected = scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(share, 1).masked_fill(
        ~there.repeat_interleave(share, 1)[..., None], 0.0
    )
    results = []
    for threads in (1, 2, 7):
        with engine(threads=threads):
            results.append(attend_groups(q, groups, impl="cpu"))
    for out, lse in results:
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
        assert torch.equal(out, results[0][0])
        assert lse is not None
        assert torch.equal(lse, results[0][1])  # type: ignore[arg-type]
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1)[..., :], rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("impl", ["cpu", "eager", "reference"])
@pytest.mark.parametrize("shape", ["kivi", "kivi4", "bytes"] if "SACCADE_SANITIZED" not in os.environ else ["kivi4"])
def test_poison_that_is_seen_counts(impl: str, shape: str) -> None:
    """A query of NaN makes its row NaN, a channel of NaN its channel, and no other."""
    if impl == "cpu" and cpu.missing() is not None:
        pytest.skip(f"no C++ engine: {cpu.missing()}")
    q, groups = problem(shape)
    q, clean = q.clone(), attend_groups(q, groups, impl=impl)[0]
    q[0, 0, 0, 3] = NAN
    out, lse = attend_groups(q, groups, impl=impl)
    rows = torch.zeros(q.shape[:3], dtype=torch.bool)
    rows[0, 0, 0] = True
    assert lse is not None
    assert bool(out[rows].isnan().all())
    assert bool(lse[rows].isnan().all())
    torch.testing.assert_close(out[~rows], clean[~rows], rtol=0, atol=1e-6)


def test_codes_lie_in_bytes_as_said() -> None:
    for bits, expected in ((8, [1, 2, 3, 0]), (4, [1 + 16 * 3, 2]), (2, [1 + 4 * 2 + 16 * 3])):
        codes = torch.tensor([1, 2, 3, 0], dtype=torch.uint8)
        assert squeeze_codes(codes, bits).tolist() == expected
        assert spread_codes(squeeze_codes(codes, bits), bits).tolist() == codes.tolist()


def test_no_groups_at_all() -> None:
    q, groups = problem("kivi")
    groups = replace(groups, lengths=torch.zeros_like(groups.lengths))
    for impl in ("auto", "eager", "reference"):
        out, lse = attend_groups(q, groups, impl=impl)
        assert out.shape == (*q.shape[:3], 128)
        assert not bool(out.any())
        assert lse is not None
        assert bool((lse == -INF).all())


def test_bad_input() -> None:
    q, groups = problem("kivi")
    for change, message in (
        ({"bits": 3}, "bits=3: expected 8, 4 or 2"),
        ({"size": 0}, "size=0: expected at least 1 token"),
        ({"key": groups.key[:, 1:]}, r"key of shape \(12, 511\) and torch.uint8: expected torch.uint8 \[12, 512\]"),
        ({"key_low": groups.key_low.half()}, r"key_low of shape \(12, 64\) and torch.float16: expected torch.float32"),
        ({"lengths": groups.lengths[:1]}, r"lengths of shape \(1, 2\): expected \[B, G, T\] and \[B, G\]"),
        ({"table": groups.table.int()}, "table of dtype torch.int32: expected torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(groups, **change)
    with pytest.raises(ValueError, match=r"expected floating point \[batch, heads, tokens, dim\]"):
        attend_groups(q.long(), groups)
    with pytest.raises(ValueError, match=r"head dim 64: expected those of q, \(2, 8, 1, 63\)"):
        attend_groups(q[..., :63], groups)
    with pytest.raises(ValueError, match=r"table has group 999: expected groups in \[0, 12\)"):
        attend_groups(q, replace(groups, table=torch.full_like(groups.table, 999)))
    with pytest.raises(ValueError, match=r"lengths in \[0, 9\]: expected \[0, 5\], the table's room"):
        attend_groups(q, replace(groups, lengths=torch.tensor([[9, 2], [0, 3]])))


@needs_engine
def test_what_the_engine_refuses() -> None:
    q, groups = problem("kivi")
    with pytest.raises(ValueError, match="up to 64 queries that share packed tokens"):
        attend_groups(q.expand(-1, -1, 17, -1), groups, impl="cpu")
    finer = {name: torch.cat([getattr(groups, name)] * 4, 1) for name in ("value_scale", "value_low")}
    with pytest.raises(ValueError, match="in 16 channels at a time, channels=8"):
        attend_groups(q, replace(groups, **finer), impl="cpu")
    with pytest.raises(ValueError, match="computes in fp32, q is fp64"):
        attend_groups(q.double(), groups, impl="cpu")
