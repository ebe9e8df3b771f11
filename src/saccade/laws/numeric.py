"""Laws about numbers: agreement with the reference, gradients, independence, determinism (1, 2, 7, 9, 12)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.laws.base import (
    NotApplicable, Problem, expect, expect_close, expect_equal, gradients, poisoned_empty,
)  # fmt: skip
from saccade.laws.subjects import Subject
from saccade.types import Kind

SLACK = 1e-6
"""Errors below this share of the largest value are rounding, whatever the reference managed."""


def reference_agreement(subject: Subject) -> str:
    """1. Error at most twice that of the same-dtype reference against fp64: output and every gradient."""
    subject.require_pairwise()
    subject.require("backward")
    if subject.card.kind is Kind.MIXER:
        return _backward_stable(subject)
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        problem = subject.problem().to(dtype)
        run = subject.frozen(problem)
        gold = gradients(lambda p: run(*p.leaves, impl="reference"), problem.to(torch.float64))  # noqa: B023
        low = gradients(lambda p: run(*p.leaves, impl="reference"), problem)  # noqa: B023
        got = gradients(lambda p: run(*p.leaves, impl="auto"), problem)  # noqa: B023
        for name, g, b, x in zip("out dq dk dv".split(), *(_flat(r) for r in (gold, low, got)), strict=True):
            scale = max(float(g.abs().max()), 1e-6)
            floor = SLACK * scale if dtype == torch.float32 else 2**-8 * scale
            bound = 2 * float((b.double() - g).abs().max()) + floor
            error = float((x.double() - g).abs().max())
            expect(error <= bound, f"{name} in {dtype}: error {error:.3g} against fp64, at most {bound:.3g} allowed")
            worst = max(worst, error / bound)
    return f"largest error {worst:.0%} of what is allowed"


def _flat(result: tuple[Tensor, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return result[0], *result[1]


def _backward_stable(subject: Subject) -> str:
    """For one form only: the fp32 error is that of inputs off by a rounding, within a modest factor."""
    problem = subject.problem().to(torch.float64)
    gold = _flat(gradients(subject.run, problem))
    generator = torch.Generator().manual_seed(2)

    def jog(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x) * 2 - 1
        return x * (1 + 2**-23 * noise)

    moved = _flat(gradients(subject.run, Problem(*(jog(x) for x in problem.leaves), problem.geometry)))
    got = _flat(gradients(subject.run, problem.to(torch.float32)))
    worst = 0.0
    for name, g, m, x in zip("out dq dk dv".split(), gold, moved, got, strict=True):
        bound = 16 * float((m - g).abs().max()) + 16 * 2**-23 * max(float(g.abs().max()), 1e-6)
        error = float((x.double() - g).abs().max())
        expect(error <= bound, f"{name} in fp32: error {error:.3g} against fp64, at most {bound:.3g} allowed")
        worst = max(worst, error / bound)
    return f"largest error {worst:.0%} of what is allowed"


def gradient_check(subject: Subject) -> str:
    """2. `gradcheck` in fp64, with what was selected held fixed."""
    subject.require("backward")
    if subject.card.kind in (Kind.LAYER,):
        return _layer_gradient_check(subject)
    subject.require_pairwise()
    problem = subject.problem(queries=9, batch=1, heads=2, groups=1, dim=4, dtype=torch.float64)
    problem = problem if subject.card.kind is Kind.SELECTOR or "gqa" in subject.card.supports else subject.problem(
        queries=9, batch=1, heads=2, groups=2, dim=4, dtype=torch.float64
    )  # fmt: skip
    if _needs_wide_heads(subject):
        problem = subject.problem(queries=6, batch=1, heads=4, dim=8, dtype=torch.float64)
    run = subject.frozen(problem)
    leaves = problem.with_grad().leaves
    passed = torch.autograd.gradcheck(lambda q, k, v: run(q, k, v), leaves, fast_mode=True, raise_exception=False)
    expect(passed, "analytic and numeric gradients differ in fp64")
    return ""


def _needs_wide_heads(subject: Subject) -> bool:
    """Modules fix the head count and dim in their settings."""
    return isinstance(subject.mechanism, nn.Module) or subject.card.kind is Kind.HEADS


def _layer_gradient_check(subject: Subject) -> str:
    module = subject.mechanism.double()
    inputs = _layer_inputs(subject, 1, torch.float64)
    leaves = tuple(x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs)
    weights = tuple(p for p in module.parameters() if p.requires_grad)
    passed = torch.autograd.gradcheck(
        lambda *_: module(*leaves), leaves + weights, fast_mode=True, raise_exception=False
    )
    expect(passed, "analytic and numeric gradients differ in fp64")
    return f"inputs and {len(weights)} weights"


def _layer_inputs(subject: Subject, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return subject.mechanism.sample_inputs(batch, generator, dtype, subject.device)


def independence(subject: Subject) -> str:
    """7. An item does not feel its batch, heads carry no order, and GQA equals repeated heads."""
    if subject.card.kind is Kind.LAYER:
        inputs = _layer_inputs(subject, 2, torch.float32)
        whole = subject.mechanism.float()(*inputs)
        alone = subject.mechanism(*(x[:1] if x.ndim and x.shape[0] == 2 else x for x in inputs))
        expect_close(alone, whole[:1], "an item alone and in its batch")
        return "batch"
    subject.require_pairwise()
    problem = subject.problem()
    whole = subject.run(problem)
    alone = Problem(*(x[:1] for x in problem.leaves), problem.geometry)
    expect_close(subject.run(alone), whole[:1], "an item alone and in its batch")
    checked = ["batch"]
    if not subject.card.heads_differ:
        q, k, v = problem.leaves
        share = q.shape[1] // k.shape[1]
        swapped = q.unflatten(1, (-1, share)).flip(1).flatten(1, 2)
        out = subject.run(Problem(swapped, k.flip(1), v.flip(1), problem.geometry))
        expect_close(out.unflatten(1, (-1, share)).flip(1).flatten(1, 2), whole, "heads in another order")
        checked.append("head order")
    if "gqa" in subject.card.supports:
        share = problem.q.shape[1] // problem.k.shape[1]
        repeated = [x.repeat_interleave(share, 1) for x in (problem.k, problem.v)]
        out = subject.run(Problem(problem.q, *repeated, problem.geometry))
        expect_close(out, whole, "grouped and repeated key/value heads")
        checked.append("grouped heads")
    return ", ".join(checked)


def everything_written(subject: Subject) -> str:
    """9. Every element of the output is written: uninitialised memory holds NaN meanwhile."""
    if subject.card.kind is Kind.LAYER:
        inputs = _layer_inputs(subject, 2, torch.float32)
        clean = subject.mechanism.float()(*inputs)
        with poisoned_empty():
            expect_equal(subject.mechanism(*inputs), clean, "with poisoned memory")
        return ""
    subject.require_pairwise()
    problem = subject.problem(queries=77)
    clean, clean_grads = gradients(subject.run, problem) if "backward" in subject.card.supports else (subject.run(problem), ())
    with poisoned_empty():
        if clean_grads:
            out, grads = gradients(subject.run, problem)
            for name, got, wanted in zip(("dq", "dk", "dv"), grads, clean_grads, strict=True):
                expect_equal(got, wanted, f"{name} with poisoned memory")
        else:
            out = subject.run(problem)
    expect_equal(out, clean, "with poisoned memory")
    return ""


def determinism(subject: Subject) -> str:
    """12. Under `torch.use_deterministic_algorithms` the same call gives the same bits, gradients included."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        if subject.card.kind is Kind.LAYER:
            inputs = _layer_inputs(subject, 2, torch.float32)
            module = subject.mechanism.float()
            expect_equal(module(*inputs), module(*inputs), "two runs")
            return ""
        subject.require_pairwise()
        problem = subject.problem(queries=130)
        if "backward" not in subject.card.supports:
            expect_equal(subject.run(problem), subject.run(problem), "two runs")
            return "forward"
        first, second = (gradients(subject.run, problem) for _ in range(2))
        for name, a, b in zip(("out", "dq", "dk", "dv"), _flat(first), _flat(second), strict=True):
            expect_equal(a, b, f"{name} of two runs")
        return "forward and backward"
    finally:
        torch.use_deterministic_algorithms(before)


__all__ = ["NotApplicable", "determinism", "everything_written", "gradient_check", "independence", "reference_agreement"]
