"""Laws about numbers: agreement with the reference, gradients, independence, determinism (1, 2, 7, 9, 12)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from saccade.laws.base import (
    Broken,
    Problem,
    deterministic,
    expect,
    expect_close,
    expect_equal,
    gradients,
    poisoned_empty,
)  # fmt: skip
from saccade.laws.subjects import Subject
from saccade.types import Kind

SLACK = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Errors below this share of the largest value are rounding, whatever the reference managed."""

NAMES = ("out", "dq", "dk", "dv")


def reference_agreement(subject: Subject) -> str:
    """1. Error at most twice that of the same-dtype reference against fp64: output and every gradient."""
    if subject.card.kind is Kind.MIXER:
        problem = subject.problem().to(torch.float64)

        def mix(*leaves: Tensor) -> Tensor:
            return subject.run(problem.having(*leaves))

        return expect_stable(mix, problem.leaves, NAMES[1:])
    worst = 0.0
    for dtype in SLACK:
        problem = subject.problem().to(dtype)
        run = subject.frozen(problem)
        calls = ((problem.to(torch.float64), "reference"), (problem, "reference"), (problem, "auto"))
        gold, low, got = (_results(subject, run, given, impl) for given, impl in calls)
        worst = max(worst, expect_within_twice(gold, low, got, dtype))
    return f"largest error {worst:.0%} of what is allowed" + ("" if subject.can_backward else ", forward only")


def _results(subject: Subject, run: Callable[..., Any], problem: Problem, impl: str) -> tuple[Tensor, ...]:
    """Output and, if the card lists them, gradients."""

    def call(given: Problem) -> Tensor:
        return run(*given.leaves, impl=impl)

    return _all(subject, call, problem)


def _all(subject: Subject, call: Callable[[Problem], Tensor], problem: Problem) -> tuple[Tensor, ...]:
    if not subject.can_backward:
        return (call(problem),)
    out, grads = gradients(call, problem)
    return out, *grads


def expect_within_twice(
    gold: Sequence[Tensor], low: Sequence[Tensor], got: Sequence[Tensor], dtype: torch.dtype,
    names: Sequence[str] = NAMES,
) -> float:  # fmt: skip
    """Each of `got` at most twice as far from `gold` as `low` is; returns the largest error over what is allowed."""
    worst = 0.0
    for name, g, b, x in zip(names, gold, low, got, strict=False):
        scale = max(float(g.abs().max()), 1e-6)
        bound = 2 * float((b.double() - g).abs().max()) + SLACK[dtype] * scale
        error = float((x.double() - g).abs().max())
        expect(error <= bound, f"{name} in {dtype}: error {error:.3g} against fp64, at most {bound:.3g} allowed")
        worst = max(worst, error / bound)
    return worst


def expect_stable(function: Callable[..., Tensor], leaves: Sequence[Tensor], names: Sequence[str]) -> str:
    """For what has one form only: the fp32 error is that of inputs off by a rounding, within a factor of 16.

    Args:
        function: From tensors to the output.
        leaves: Its inputs in fp64.
        names: Of the gradients, one for each leaf.

    Returns:
        A note for the verdict.
    """
    generator = torch.Generator().manual_seed(2)
    exact = [x.detach().float().double() for x in leaves]
    moved = [x * (1 + 2**-23 * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x) - 1)) for x in exact]
    gold, near = (_value_and_gradients(function, given) for given in (exact, moved))
    got = _value_and_gradients(function, [x.float() for x in exact])
    worst = 0.0
    for name, g, m, x in zip(("out", *names), gold, near, got, strict=True):
        bound = 16 * float((m - g).abs().max()) + 16 * 2**-23 * max(float(g.abs().max()), 1e-6)
        error = float((x.double() - g).abs().max())
        expect(error <= bound, f"{name} in fp32: error {error:.3g} against fp64, at most {bound:.3g} allowed")
        worst = max(worst, error / bound)
    return f"largest error {worst:.0%} of what is allowed"


def _value_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
    return out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))


def gradient_check(subject: Subject) -> str:
    """2. `gradcheck` in fp64, with what was selected held fixed."""
    subject.require("backward")
    fixed = isinstance(subject.mechanism, nn.Module) or subject.card.kind is Kind.HEADS  # settings fix heads and dim
    heads, queries, dim = (4, 6, 8) if fixed else (2, 9, 4)
    share = 2 if "gqa" in subject.card.supports and subject.card.kind is not Kind.HEADS else 1
    problem = subject.problem(
        queries=queries, batch=1, heads=heads, groups=heads // share, dim=dim, dtype=torch.float64
    )
    if isinstance(subject.mechanism, nn.Module):
        subject.mechanism.double()
    run = subject.frozen(problem)
    weights = trained(subject.mechanism)
    expect_gradcheck(lambda q, k, v, *_: run(q, k, v), (*problem.with_grad().leaves, *weights))
    return f"q, k, v and {len(weights)} weights" if weights else ""


def trained(mechanism: Any) -> tuple[nn.Parameter, ...]:
    """The weights that ask for gradients."""
    if not isinstance(mechanism, nn.Module):
        return ()
    return tuple(weight for weight in mechanism.parameters() if weight.requires_grad)


def expect_gradcheck(function: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> None:
    """Analytic gradients of `function` with respect to fp64 `leaves` equal numeric ones."""
    try:
        torch.autograd.gradcheck(function, leaves, fast_mode=True)
    except GradcheckError as error:
        raise Broken(f"analytic and numeric gradients differ: {' '.join(str(error).split())[:200]}") from error


def independence(subject: Subject) -> str:
    """7. An item does not feel its batch, heads carry no order, and GQA equals repeated heads."""
    problem = subject.problem()
    whole = subject.run(problem)
    alone = problem.having(*(x[:1] for x in problem.leaves))
    expect_close(subject.run(alone), whole[:1], "an item alone and in its batch")
    checked = ["batch"]
    if not subject.card.heads_differ:
        out = subject.run(reversed_heads(problem))
        expect_close(unreversed(out, problem), whole, "heads in another order")
        checked.append("head order")
    if "gqa" in subject.card.supports:
        share = problem.q.shape[1] // problem.k.shape[1]
        repeated = [x.repeat_interleave(share, 1) for x in (problem.k, problem.v)]
        q = problem.q
        if subject.card.heads_share:
            q = q[:, ::share].repeat_interleave(share, 1)
            whole = subject.run(problem.having(q, problem.k, problem.v))
        expect_close(subject.run(problem.having(q, *repeated)), whole, "grouped and repeated key/value heads")
        checked.append("grouped heads that ask alike" if subject.card.heads_share else "grouped heads")
    return ", ".join(checked)


def reversed_heads(problem: Problem) -> Problem:
    """Key/value heads in reverse order, each with its query heads."""
    share = problem.q.shape[1] // problem.k.shape[1]
    q = problem.q.unflatten(1, (-1, share)).flip(1).flatten(1, 2)
    return Problem(q, problem.k.flip(1), problem.v.flip(1), problem.geometry)


def unreversed(out: Tensor, problem: Problem) -> Tensor:
    """An output `[B, H, ...]` of `reversed_heads(problem)` in the order of `problem`."""
    share = problem.q.shape[1] // problem.k.shape[1]
    return out.unflatten(1, (-1, share)).flip(1).flatten(1, 2)


def everything_written(subject: Subject) -> str:
    """9. Every element of the output is written: uninitialised memory holds NaN meanwhile."""
    problem = subject.problem(queries=77)
    clean = _all(subject, subject.run, problem)
    with poisoned_empty():
        got = _all(subject, subject.run, problem)
    for name, x, wanted in zip(NAMES, got, clean, strict=False):
        expect_equal(x, wanted, f"{name} with poisoned memory")
    return ""


def determinism(subject: Subject) -> str:
    """12. Under `torch.use_deterministic_algorithms` the same call gives the same bits, gradients included."""
    problem = subject.problem(queries=130)
    with deterministic():
        first, second = (_all(subject, subject.run, problem) for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=False):
        expect_equal(b, a, f"{name} of two runs")
    return "forward and backward" if subject.can_backward else "forward"
