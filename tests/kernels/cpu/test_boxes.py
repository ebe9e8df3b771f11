"""The C++ engine within boxes of a grid, against fp64 formulas written here."""

from __future__ import annotations

import itertools
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}"),
]

CASES = [
    # sizes, kernel, dilation, heads, groups, D, E
    ((1,), (1,), (1,), 1, 1, 4, 4),
    ((53,), (7,), (1,), 2, 1, 16, 16),
    ((300,), (201,), (1,), 2, 2, 20, 33),
    ((13, 17), (7, 5), (1, 1), 4, 2, 32, 32),
    ((20, 9), (3, 4), (3, 2), 2, 1, 24, 40),
    ((5, 7, 11), (3, 3, 5), (1, 2, 1), 2, 2, 17, 5),
    ((2, 40, 3), (1, 3, 3), (2, 7, 1), 1, 1, 64, 64),
    ((7, 37), (7, 7), (1, 1), 2, 2, 48, 32),  # a window as high as the map, a tail in every row
    ((9, 40), (12, 30), (1, 1), 1, 1, 32, 64),  # one higher than the map, and windows that jump by more than a vector
]
ACROSS = ("tiles", "rows")


def window(size: int, kernel: int, dilation: int) -> tuple[list[int], list[int]]:
    """A window about every coordinate, moved inside the coordinates of equal remainder."""
    first, last = [], []
    for x in range(size):
        members = list(range(x % dilation, size, dilation))
        length = min(kernel, len(members))
        start = min(max(members.index(x) - length // 2, 0), len(members) - length)
        first.append(members[start])
        last.append(members[start + length - 1])
    return first, last


def grid_mask(windows: list[tuple[list[int], list[int]]], dilation: tuple[int, ...]) -> Tensor:
    """Bool `[N, N]`, pair by pair along each axis."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for (first, last), step in zip(windows, dilation, strict=True):
        sees = torch.zeros(len(first), len(first), dtype=torch.bool)
        for x, y in itertools.product(range(len(first)), repeat=2):
            sees[x, y] = first[x] <= y <= last[x] and (y - x) % step == 0
        mask = torch.kron(mask, sees)
    return mask


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Out and lse in fp64."""
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@lru_cache(maxsize=64)
def problem(case, dtype=torch.float32, batch=2):
    sizes, kernel, dilation, heads, groups, dim, value_dim = case
    windows = [window(*axis) for axis in zip(sizes, kernel, dilation, strict=True)]
    mask = grid_mask(windows, dilation)
    ends = tuple(torch.tensor([x for both in windows for x in both[end]]).int() for end in (0, 1))
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, heads, len(mask), dim), *((batch, groups, len(mask), d) for d in (dim, value_dim))]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v, (*ends, list(sizes), list(dilation)), mask


def gradients(q, k, v, boxes, scale, grad_out, grad_lse, across="cheaper"):
    out, lse = cpu.boxes_attention(q, k, v, *boxes, scale, across)
    return out, lse, *cpu.boxes_gradients(grad_out, grad_lse, q, k, v, out, lse, *boxes, scale, across)


def agree(q, k, v, boxes, mask, scale, across):
    """Out, lse and gradients are those of the formula."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = exact(*leaves, mask, scale)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    wanted = (out, lse, *torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse)))
    found = gradients(q, k, v, boxes, scale, grad_out.float(), grad_lse.float(), across)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        assert torch.allclose(x.double(), y.detach(), rtol=1e-4, atol=2e-5), name


@pytest.mark.parametrize("across", ACROSS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("case", "scale"), [*((case, 0.3) for case in CASES), (CASES[3], -0.2)])
def test_equals_the_formula(engine, case, scale, dtype, across, isa):
    q, k, v, boxes, mask = problem(case, dtype)
    with engine(isa):
        agree(q, k, v, boxes, mask, scale, across)


@pytest.mark.parametrize("across", ACROSS)
def test_windows_of_any_length(engine, across, isa):
    """Each axis its own: causal (short at first), one that opens by leaps, and one that stands still."""
    lines = [
        ([max(x - 2, 0) for x in range(6)], list(range(6))),
        ([0] * 5 + [4] * 2, [3] * 4 + [6] * 3),
        ([x // 20 * 20 for x in range(45)], [min(x // 20 * 20 + 22, 44) for x in range(45)]),
    ]
    mask, sizes = grid_mask(lines, (1, 1, 1)), [6, 7, 45]
    ends = [torch.tensor([x for line in lines for x in line[end]]).int() for end in (0, 1)]
    q, k, v = (torch.randn(1, heads, len(mask), 8, generator=torch.Generator().manual_seed(2)) for heads in (2, 1, 1))
    with engine(isa):
        agree(q, k, v, (*ends, sizes, [1, 1, 1]), mask, 0.3, across)


def test_rows_wider_than_a_part(engine, isa):
    q, k, v, boxes, mask = problem(((2, 300), (2, 9), (1, 1), 2, 1, 8, 8), batch=1)
    with engine(isa):
        agree(q, k, v, boxes, mask, 0.3, "rows")


@pytest.mark.parametrize("across", ACROSS)
def test_strides_do_not_matter(engine, across, isa):
    q, k, v, boxes, _ = problem(CASES[3])
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    spread = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    with engine(isa):
        plain = cpu.boxes_attention(q, k, v, *boxes, 0.3, across)
        for other in (moved, spread):
            for x, y in zip(plain, cpu.boxes_attention(*other, *boxes, 0.3, across), strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("across", ACROSS)
@pytest.mark.parametrize("case", [CASES[3], CASES[5]])
def test_threads_do_not_matter(engine, case, across, isa):
    q, k, v, boxes, _ = problem(case)
    grad_out, grad_lse = torch.randn(*q.shape[:3], v.shape[3]), torch.randn(q.shape[:3])
    results = []
    for threads in (1, 2, 7):
        with engine(isa, threads):
            results.append(gradients(q, k, v, boxes, 0.3, grad_out, grad_lse, across))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("across", ACROSS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["k", "v"])
def test_poison_reaches_those_who_see_it_only(engine, which, bad, across, isa):
    q, k, v, boxes, mask = problem(CASES[3])
    token, sees = 100, mask[:, 100]
    poisoned = {"k": k.clone(), "v": v.clone()}
    poisoned[which][:, :, token, 1] = bad
    grad_out, grad_lse = torch.randn_like(q), torch.zeros(q.shape[:3])
    grad_out[:, :, sees] = 0
    with engine(isa):
        out, lse, dq, _, _ = gradients(q, poisoned["k"], poisoned["v"], boxes, 0.3, grad_out, grad_lse, across)
        clean, clean_lse, clean_dq, _, _ = gradients(q, k, v, boxes, 0.3, grad_out, grad_lse, across)
    assert torch.equal(out[:, :, ~sees], clean[:, :, ~sees])
    assert torch.equal(lse[:, :, ~sees], clean_lse[:, :, ~sees])
    assert torch.equal(dq[:, :, ~sees], clean_dq[:, :, ~sees])
    if which == "v":
        assert not out[:, :, sees, 1].isfinite().any()


@pytest.mark.parametrize("across", ACROSS)
@pytest.mark.parametrize("which", ["q", "grad_out"])
def test_poisoned_queries_reach_the_gradients_of_what_they_see_only(engine, which, across, isa):
    q, k, v, boxes, mask = problem(CASES[4])
    given = {"q": q.clone(), "grad_out": torch.randn(*q.shape[:3], v.shape[3])}
    rest = (torch.zeros(q.shape[:3]), across)
    with engine(isa):
        _, _, _, *clean = gradients(given["q"], k, v, boxes, 0.3, given["grad_out"], *rest)
        given[which][:, :, 77, 0] = float("nan")
        _, _, _, *dirty = gradients(given["q"], k, v, boxes, 0.3, given["grad_out"], *rest)
    for x, y in zip(clean, dirty, strict=True):
        assert torch.equal(x[:, :, ~mask[77]], y[:, :, ~mask[77]])
        assert not y[:, :, mask[77]].isfinite().all(-1).any()


@pytest.mark.parametrize(
    ("first", "last"),
    [([0, 0, -1], [1, 2, 2]), ([0, 0, 1], [1, 2, 3]), ([0, 2, 1], [1, 2, 2]), ([0, 0, 2], [1, 2, 1])],
)
def test_windows_that_leave_the_grid_are_refused(first, last):
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="expected windows on the grid"):
        cpu.boxes_attention(x, x, x, torch.tensor(first).int(), torch.tensor(last).int(), [3], [1], 1.0)


@pytest.mark.parametrize("across", ACROSS)
@pytest.mark.parametrize("dilation", [5, 2**32, 2**62])
def test_a_dilation_beyond_the_grid_leaves_each_token_to_itself(engine, dilation, across, isa):
    q, k, v = (torch.randn(1, 1, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    alone = torch.arange(5, dtype=torch.int32)
    with engine(isa):
        out, lse = cpu.boxes_attention(q, k, v, alone, alone, [5], [dilation], 1.0, across)
        gradients = cpu.boxes_gradients(out, lse, q, k, v, out, lse, alone, alone, [5], [dilation], 1.0, across)
    assert torch.equal(out, v)
    torch.testing.assert_close(lse, (q * k).sum(-1))
    torch.testing.assert_close(gradients[2], out)
