"""NaN and inf that a query sees give what the formula gives, in every implementation; what it does not see is inert."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops import attend, block_attend, decode_attend, gather_attend
from saccade.types import AttentionOutput, BlockLayout, Boxes, KVPages, TokenIndex

INF, NAN = math.inf, math.nan
TOKENS, WINDOW, SCALE = 70, 20, 0.3

Engine = Callable[..., AttentionOutput]


def draw(heads: int, dim: int, seed: int) -> Tensor:
    return torch.randn(1, heads, TOKENS, dim, generator=torch.Generator().manual_seed(seed))


def poisoned(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query head 0 scores the infinite key +inf, head 1 -inf; head 2 and 3 have both signs."""
    q, k, v = draw(4, 24, 0), draw(2, 24, 1), draw(2, 24, 2)
    q[:, 0, :, 3], q[:, 1, :, 3] = q[:, 0, :, 3].abs() + 0.1, -q[:, 1, :, 3].abs() - 0.1
    token = 30
    if kind == "key":
        k[:, :, token, 3] = INF
    elif kind == "nan key":
        k[:, :, token, 3] = NAN
    elif kind == "value":
        v[:, 0, token, 5], v[:, 1, token, 7] = INF, NAN
    elif kind == "key and value":
        k[:, :, token, 3], v[:, :, token, 5] = INF, -INF
    elif kind == "vanished weight":
        k[:, :, token] = 0.0
        k[:, :, token, 3], v[:, :, token, 5] = 1e6, NAN  # head 1's score is about -1e5: its weight is 0 in fp32
    return q, k, v


KINDS = ("key", "nan key", "value", "key and value", "vanished weight")
SEEN = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).clamp(-1, WINDOW + 1) % (WINDOW + 2) <= WINDOW
SEEN &= torch.arange(TOKENS)[:, None] >= torch.arange(TOKENS)


def formula(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row in fp64, over the keys that the row sees and no others."""
    out, lse = torch.zeros(*q.shape[:3], v.shape[3]).double(), torch.full(q.shape[:3], -INF).double()
    share = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        for row in range(q.shape[2]):
            keys, values = (x[0, head // share, seen[row]].double() for x in (k, v))
            scores = keys @ q[0, head, row].double() * SCALE
            top = scores.max() if len(scores) else torch.tensor(-INF)
            weights = (scores - (0.0 if top == -INF else top)).exp()
            weights = weights.float().double()  # what has vanished in fp32 has vanished
            total = weights.sum()
            out[0, head, row] = (weights[:, None] * values).sum(0) / (total if total != 0 else 1.0)
            lse[0, head, row] = total.log() + top if total != 0 else -INF
    return out, lse


def agree(found: AttentionOutput, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, error: float = 1e-4) -> None:
    """The same numbers where they are finite, NaN or inf where they are not; of lse the same NaN and -inf."""
    out, lse = formula(q, k, v, seen)
    assert found.lse is not None
    assert torch.equal(found.out.isfinite(), out.isfinite())
    assert torch.equal(found.lse.isnan(), lse.isnan())
    torch.testing.assert_close(found.out.double().nan_to_num(0, 0, 0), out.nan_to_num(0, 0, 0), rtol=0, atol=error)
    torch.testing.assert_close(found.lse.double().nan_to_num(0), lse.nan_to_num(0), rtol=error, atol=error)


BLOCKS = BlockLayout.from_dense(SEEN, 16)
LISTS = torch.where(SEEN, torch.arange(TOKENS), -1).sort(-1, descending=True).values[None, None, :, : WINDOW + 1]
INDEX = TokenIndex(LISTS, TOKENS, TOKENS)
BOXES = Boxes(torch.arange(TOKENS).sub(WINDOW).clamp(min=0).int(), torch.arange(TOKENS).int(), (TOKENS,), (1,))
ENGINES: dict[str, Engine] = {
    "attend": partial(attend, causal=True, window=(WINDOW, 0)),
    "attend bias": partial(attend, bias=torch.zeros(SEEN.shape).masked_fill(~SEEN, -INF)),
    "block_attend": lambda q, k, v, **rules: block_attend(q, k, v, BLOCKS, **rules),
    "gather_attend": lambda q, k, v, **rules: gather_attend(q, k, v, INDEX, **rules),
    "boxes": lambda q, k, v, **rules: gather_attend(q, k, v, BOXES, **rules),
    "decode_attend": lambda q, k, v, **rules: decode_attend(
        q, KVPages.from_dense(k, v, page_size=16), window=(WINDOW, 0), **rules
    ),
}  # fmt: skip
TRAINED = ("attend", "attend bias", "block_attend", "gather_attend", "boxes")


@contextlib.contextmanager
def on(impl: str) -> Iterator[str]:
    """The implementation's name; `cpu-SET` is the C++ engine on an instruction set."""
    name, _, chosen = impl.partition("-")
    if not chosen:
        yield name
        return
    if cpu.missing() is not None:
        pytest.skip(f"no C++ engine: {cpu.missing()}")
    if cpu.use(chosen) is None:
        pytest.skip(f"this machine or build has no {chosen}")
    try:
        yield name
    finally:
        cpu.use(None)


IMPLS = ("reference", "eager", *(f"cpu-{name}" for name in cpu.INSTRUCTION_SETS))


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_gives_what_the_formula_gives(kind: str, engine: str, impl: str) -> None:
    q, k, v = poisoned(kind)
    with on(impl) as name:
        found = ENGINES[engine](q, k, v, scale=SCALE, return_lse=True, impl=name)
    assert not bool(found.out.isfinite().all())
    agree(found, q, k, v, SEEN)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("engine", ENGINES)
def test_rows_whose_every_score_is_minus_infinity_are_empty(engine: str, impl: str) -> None:
    """Rows that see nothing but the infinite keys; one of these has an infinite value too, and 0 * inf is NaN."""
    q, k, v = poisoned("none")
    k[:, :, 5:30, 3], v[:, 1, 29, 2] = INF, INF
    with on(impl) as name:
        found = ENGINES[engine](q, k, v, scale=SCALE, return_lse=True, impl=name)
    assert bool((found.lse[0, 1, 26:30] == -INF).all() and (found.out[0, 1, 26:30] == 0).all())
    agree(found, q, k, v, SEEN)


@pytest.mark.parametrize("impl", IMPLS[2:])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_agrees_on_what_is_finite(engine: str, kind: str, impl: str) -> None:
    q, k, v = (x.bfloat16() for x in poisoned(kind))
    with on(impl) as name:
        found = ENGINES[engine](q, k, v, scale=SCALE, return_lse=True, impl=name)
    agree(found, q, k, v, SEEN, 0.05)


@pytest.mark.parametrize("impl", ["sdpa", *IMPLS[:2], IMPLS[2]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_row_too(kind: str, impl: str) -> None:
    """Causal and nothing else, which PyTorch's fused kernel runs."""
    q, k, v = poisoned(kind)
    with on(impl) as name:
        found = attend(q, k, v, causal=True, scale=SCALE, return_lse=True, impl=name)
    agree(found, q, k, v, torch.ones(TOKENS, TOKENS).tril().bool())


@pytest.mark.quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("engine", TRAINED)
@pytest.mark.parametrize("kind", [*KINDS, "query", "gradient"])
def test_gradients_stay_with_those_who_see_it(kind: str, engine: str, impl: str) -> None:
    """Rows that see the token, and the keys that such rows see; all others have the gradients of a clean problem."""
    if engine == "gather_attend" and impl.startswith("cpu"):
        pytest.skip("gradients of gathered keys are not in the C++ engine")
    results = []
    for leaves in (poisoned("none"), poisoned(kind)):
        q, k, v = (x.clone().requires_grad_() for x in leaves)
        grad = draw(4, 24, 7)
        rows = SEEN[:, 30].clone()
        if kind in ("query", "gradient"):
            rows = torch.arange(TOKENS) == 40
        if kind == "query" and results:
            q.data[:, :, 40, 1] = NAN
        if kind == "gradient" and results:
            grad[:, :, 40, 1] = INF
        if kind == "vanished weight" and not results:
            k.data[:] = poisoned(kind)[1]
        with on(impl) as name:
            out = ENGINES[engine](q, k, v, scale=SCALE, impl=name)
            results.append(torch.autograd.grad(out, (q, k, v), grad))
    reached = SEEN[rows].any(0)
    for found, clean, touched in zip(results[1], results[0], (rows, reached, reached), strict=True):
        assert bool(found[:, :, ~touched].isfinite().all())
        if kind != "key and value":
            torch.testing.assert_close(found[:, :, ~touched], clean[:, :, ~touched], rtol=1e-5, atol=1e-5)
