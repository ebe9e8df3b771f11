"""The C++ engine's attention against an fp64 formula written here, over drawn shapes, strides, dtypes and patterns."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade.kernels import cpu
from saccade.types import BlockLayout

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}"),
]

INF = float("inf")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIMS = st.one_of(st.integers(1, 130), st.sampled_from([32, 64, 80, 96, 128]))
SANITIZED = "SACCADE_SANITIZED" in os.environ
fuzz = settings(
    max_examples=10 if SANITIZED else 40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


def sized(batch: int, heads: int, rows: int, dim: int, form: str, seed: int, dtype: torch.dtype) -> Tensor:
    """`[batch, heads, rows, dim]` with the memory layout that `form` names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if form == "transformers":  # [B, N, H, D] seen as [B, H, N, D]
        return draw(batch, rows, heads, dim).transpose(1, 2)
    if form == "padded":  # rows further apart than they are long, at an odd offset
        return draw(batch, heads, rows, dim + 3)[..., 1 : dim + 1]
    if form == "every other":
        return draw(batch, heads, 2 * rows, dim)[:, :, ::2]
    if form == "expanded":  # all heads are one
        return draw(batch, 1, rows, dim).expand(batch, heads, rows, dim)
    if form == "columns":  # the last axis is not contiguous
        return draw(batch, heads, dim, rows).mT
    return draw(batch, heads, rows, dim)


FORMS = st.sampled_from(["plain", "transformers", "padded", "every other", "expanded", "columns"])


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense softmax attention in fp64; `keep` bool, broadcasting to `[B, H, M, N]`."""
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(~keep, -INF)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -INF, 0.0)[..., None])
    return weights @ v, lse


def band_mask(queries: int, keys: int, left: int, right: int) -> Tensor:
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    keep = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        keep &= distance >= -left
    if right >= 0:
        keep &= distance <= right
    return keep


def penalty(slopes: Tensor, queries: int, keys: int) -> Tensor:
    """What ALiBi adds to the scores, `[H, M, N]` in fp64."""
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    return -slopes.double()[:, None, None] * distance.abs()


def agree(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], v: Tensor) -> None:
    """Out within the rounding of the weights (bf16 where they are multiplied in pairs), lse within that of fp32."""
    rounding = 2**-8 if v.dtype == torch.bfloat16 else 2e-5
    size = float(v.abs().max()) if v.numel() else 0.0
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=0, atol=rounding * size)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=2e-5, atol=2e-5)


@st.composite
def problems(draw: Callable) -> dict:
    groups, share = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    batch, seed = draw(st.integers(1, 2)), draw(st.integers(0, 2**16))
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    dim, value_dim = draw(DIMS), draw(DIMS)
    tensors = [
        sized(batch, heads, rows, width, draw(FORMS), seed + number, dtype)
        for number, (heads, rows, width) in enumerate(
            ((groups * share, queries, dim), (groups, keys, dim), (groups, keys, value_dim))
        )
    ]
    return {"qkv": tensors, "scale": draw(st.sampled_from([dim**-0.5, 0.5, 0.0, -0.3])), "seed": seed}


def drawn_rules(draw: Callable, problem: dict) -> tuple[dict, Tensor, Tensor | None]:
    """Arguments of the engine, which pairs they keep, and what is added to the scores: bias and ALiBi."""
    q, k, _ = problem["qkv"]
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    generator = torch.Generator().manual_seed(problem["seed"] + 9)
    left, right = draw(st.integers(-1, 160)), draw(st.integers(-1, 160))
    keep = band_mask(queries, keys, left, right).expand(batch, 1, queries, keys)
    rules = {"left": left, "right": right, "softcap": draw(st.sampled_from([None, 0.5, 3.0, 50.0]))}
    if draw(st.booleans()):
        rows = draw(st.sampled_from([1, batch]))
        ids = [torch.randint(-1, 3, (rows, count), generator=generator).sort(1).values for count in (queries, keys)]
        rules["segments"] = ids[0], ids[1]
        same = (ids[0][:, :, None] == ids[1][:, None]) & (ids[0][:, :, None] >= 0)
        keep = keep & same[:, None]
    bias = None
    if draw(st.booleans()):
        sizes = [draw(st.sampled_from([1, full])) for full in (batch, heads, queries, keys)]
        bias = torch.randn(sizes, generator=generator)
        bias = bias.masked_fill(torch.rand(sizes, generator=generator) < draw(st.sampled_from([0.0, 0.2])), -INF)
        rules["bias"] = bias
        keep = keep & (bias > -INF)
    if draw(st.booleans()):
        rules["alibi"] = torch.rand(heads, generator=generator) * 0.5
        lowered = penalty(rules["alibi"], queries, keys)
        bias = lowered if bias is None else bias + lowered
    return rules, keep, bias


@fuzz
@given(data=st.data())
def test_dense_attention_agrees_with_the_formula(engine, isa, data):
    problem = data.draw(problems())
    q, k, v = problem["qkv"]
    rules, keep, bias = drawn_rules(data.draw, problem)
    with engine(isa, data.draw(st.sampled_from([1, 2, 7]))):
        found = cpu.attention(q, k, v, scale=problem["scale"], **rules)
    agree(found, formula(q, k, v, keep, problem["scale"], rules["softcap"], bias), v)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (33, 129), (129, 33)])
@pytest.mark.parametrize("sides", [(-1, -1), (-1, 0), (20, 0), (11, 5)])
def test_slopes_agree_with_the_formula(engine, isa, dtype, queries, keys, sides):
    shapes = (2, 8, queries, 32), (2, 2, keys, 32), (2, 2, keys, 24)
    q, k, v = (sized(*shape, "plain", seed, dtype) for seed, shape in enumerate(shapes))
    slopes = 2.0 ** -torch.arange(1.0, 9.0)  # the paper's, of eight heads
    keep = band_mask(queries, keys, *sides)
    with engine(isa):
        found = cpu.attention(q, k, v, scale=0.2, left=sides[0], right=sides[1], alibi=slopes)
    agree(found, formula(q, k, v, keep, 0.2, None, penalty(slopes, queries, keys)), v)


def test_slopes_far_down_a_long_sequence(engine, isa):
    """A band needs only the last keys; distances stay exact however large the positions."""
    q, k, v = (sized(1, 2, rows, 16, "plain", seed, torch.float32) for seed, rows in enumerate((40, 300_000, 300_000)))
    slopes = torch.tensor([0.5, 0.03125])
    with engine(isa):
        found = cpu.attention(q, k, v, scale=0.25, left=100, right=0, alibi=slopes)
    wanted = formula(
        q, k[:, :, -200:], v[:, :, -200:], band_mask(40, 200, 100, 0), 0.25, None, penalty(slopes, 40, 200)
    )
    agree(found, wanted, v)


@pytest.mark.parametrize("block", [(16, 32), (64, 64)])
def test_slopes_under_a_layout(engine, isa, block):
    q, k, v = (sized(1, heads, rows, 16, "plain", 3, torch.float32) for heads, rows in ((4, 90), (2, 130), (2, 130)))
    mask = torch.rand(1, 4, 90, 130, generator=torch.Generator().manual_seed(4)) < 0.3
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    with engine(isa):
        found = cpu.attention(q, k, v, scale=0.25, alibi=slopes, layout=BlockLayout.from_dense(mask, block))
    agree(found, formula(q, k, v, mask, 0.25, None, penalty(slopes, 90, 130)), v)


BLOCKS = st.sampled_from([16, 24, 64, 100, 128, 256])


@st.composite
def layouts(draw: Callable, batch: int, heads: int, queries: int, keys: int) -> tuple[BlockLayout, Tensor]:
    """A layout with full, partial and absent blocks and empty rows, and its dense mask, made independently."""
    block = draw(BLOCKS), draw(BLOCKS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    cells = -(-queries // block[0]), -(-keys // block[1])
    kinds = torch.randint(0, 3, (*shape, *cells), generator=generator)  # absent, full, partial
    kinds = kinds * (torch.rand(*shape, cells[0], 1, generator=generator) > 0.2)  # some rows see nothing
    spread = kinds.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, :queries, :keys]
    mask = (spread == 1) | ((spread == 2) & (torch.rand(spread.shape, generator=generator) < 0.4))
    return BlockLayout.from_dense(mask, block), mask


@fuzz
@given(data=st.data())
def test_block_attention_agrees_with_the_formula(engine, isa, data):
    problem = data.draw(problems())
    q, k, v = problem["qkv"]
    layout, mask = data.draw(layouts(q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    softcap = data.draw(st.sampled_from([None, 2.0]))
    with engine(isa, data.draw(st.sampled_from([1, 2, 7]))):
        found = cpu.attention(q, k, v, scale=problem["scale"], softcap=softcap, layout=layout)
    agree(found, formula(q, k, v, mask, problem["scale"], softcap), v)


@settings(fuzz, max_examples=5 if SANITIZED else 15)
@given(data=st.data())
def test_bits_are_equal_from_run_to_run_and_over_threads(engine, isa, data):
    problem = data.draw(problems())
    rules, _, _ = drawn_rules(data.draw, problem)
    q, k, _ = problem["qkv"]
    if data.draw(st.booleans()):
        rules = {"layout": data.draw(layouts(q.shape[0], q.shape[1], q.shape[2], k.shape[2]))[0]}
    results = []
    with engine(isa):
        for count in (1, 1, 2, 7, 7):
            with engine(threads=count):
                results.append(cpu.attention(*problem["qkv"], scale=problem["scale"], **rules))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


POISON = st.sampled_from([float("nan"), INF, -INF])


@fuzz
@given(data=st.data())
def test_hidden_poison_changes_nothing_and_visible_poison_shows(engine, isa, data):
    """Keys and values that no query, or not every query, sees are replaced; only rows that see them may change."""
    problem = data.draw(problems())
    q, k, v = (x.clone() for x in problem["qkv"])
    rules, keep, _ = drawn_rules(data.draw, problem)
    if data.draw(st.booleans()):
        layout, keep = data.draw(layouts(q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
        rules = {"layout": layout}
    keep = keep.expand(q.shape[0], q.shape[1], -1, -1)
    tokens = data.draw(st.lists(st.integers(0, k.shape[2] - 1), min_size=1, max_size=5))
    where, value = data.draw(st.sampled_from(["k", "v", "both"])), data.draw(POISON)
    with engine(isa):
        clean = cpu.attention(q, k, v, scale=0.05, **rules)
        for x in {"k": (k,), "v": (v,), "both": (k, v)}[where]:
            x[:, :, tokens, -1] = value
        found = cpu.attention(q, k, v, scale=0.05, **rules)
    sees = keep[..., tokens].any(-1)
    torch.testing.assert_close(found[0][~sees], clean[0][~sees], rtol=0, atol=0)
    torch.testing.assert_close(found[1][~sees], clean[1][~sees], rtol=0, atol=0)
    if value != value or where == "v":
        assert not found[0][sees].isfinite().all(-1).any()


def test_scratch_left_behind_by_other_calls_does_not_show(engine, isa):
    """Memory that the allocator hands out again is full of other results."""
    keys = torch.randn(1, 1, 64, 40, generator=torch.Generator().manual_seed(0))
    values = keys.clone()
    values[:, :, 40:] = float("nan")
    with engine(isa, 1):
        for _ in range(3):
            for size in (1e30, 1.0):
                out, _ = cpu.attention(keys * size, keys, values, scale=0.1, left=-1, right=0)
        wanted, _ = formula(keys[:, :, :40], keys[:, :, :40], values[:, :, :40], band_mask(40, 40, -1, 0), 0.1)
    torch.testing.assert_close(out[:, :, :40].double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.skipif(SANITIZED, reason="the sanitizer's own memory does not fit under a limit")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs a system that tells and limits address space")
@pytest.mark.parametrize("count", [1, 2])
def test_no_memory_for_scratch_is_a_memory_error(engine, count):
    """A dim so large that a thread's scratch, 128 rows of it, does not fit where two rows of input do."""
    q = torch.zeros(1, 2, 1, 2**23)
    kv = torch.zeros(1, 1, 1, 2**23)
    with engine(threads=count):
        cpu.attention(q[..., :8], kv[..., :8], kv[..., :8], scale=1.0)  # the pool of threads exists
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 2**29, hard))
        try:
            with pytest.raises(MemoryError, match="impl='cpu': no memory for the threads' scratch"):
                cpu.attention(q, kv, kv[..., :8], scale=1.0)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        out, _ = cpu.attention(q[..., :8], kv[..., :8] + 1, kv[..., :8] + 3, scale=1.0)
    torch.testing.assert_close(out, torch.full((1, 2, 1, 8), 3.0))
