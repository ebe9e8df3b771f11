"""The laws for layers: modules with weights of their own on tokens or feature maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.laws.base import (
    NotApplicable,
    counted_work,
    deterministic,
    expect,
    expect_close,
    expect_equal,
    expect_growth,
    expect_refusal,
    poisoned_empty,
)  # fmt: skip
from saccade.laws.numeric import expect_gradcheck, expect_stable, trained
from saccade.laws.settings import refuse_settings
from saccade.laws.subjects import Subject
from saccade.laws.system import BEYOND_INT32, expect_compiles


def inputs_of(subject: Subject, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Seeded inputs that fit the example; the module is brought to their dtype."""
    subject.mechanism.to(dtype)
    return subject.mechanism.sample_inputs(batch, torch.Generator().manual_seed(0), dtype, subject.device)


def agreement(subject: Subject) -> str:
    """1. The fp32 error is that of inputs off by a rounding: output and gradients of the inputs."""
    inputs = inputs_of(subject, 2, torch.float64)
    weights = {name: weight.detach().float().double() for name, weight in subject.mechanism.named_parameters()}

    def call(*leaves: Tensor) -> Tensor:
        cast = {name: weight.to(leaves[0].dtype) for name, weight in weights.items()}
        subject.mechanism.to(leaves[0].dtype)  # buffers
        return torch.func.functional_call(subject.mechanism, cast, leaves)

    return expect_stable(call, inputs, [f"gradient {number}" for number in range(len(inputs))])


def gradient_check(subject: Subject) -> str:
    """2. `gradcheck` in fp64, of inputs and weights."""
    subject.require("backward")
    leaves = tuple(x.detach().requires_grad_() for x in inputs_of(subject, 1, torch.float64))
    weights = trained(subject.mechanism)
    expect_gradcheck(lambda *given: subject.mechanism(*given[: len(leaves)]), leaves + weights)
    return f"{len(leaves)} inputs and {len(weights)} weights"


def _prefix(subject: Subject, tokens: int | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs, and the output for the first `tokens` of the first one, which must be `[B, N, C]`."""
    inputs = inputs_of(subject, 2)
    if inputs[0].ndim != 3:
        raise NotApplicable("its inputs are feature maps, which have no past and future")
    return inputs, subject.mechanism(inputs[0][:, :tokens], *inputs[1:])


def causality(subject: Subject) -> str:
    """4. Perturbing tokens after t leaves outputs up to t bit-equal."""
    subject.require_causal()
    inputs, whole = _prefix(subject)
    for t in range(1, whole.shape[1]):
        changed = inputs[0].clone()
        changed[:, t:] = changed[:, t:] * -3 + 1
        out = subject.mechanism(changed, *inputs[1:])
        expect_equal(out[:, :t], whole[:, :t], f"outputs before token {t} after later tokens changed")
    return ""


def one_answer(subject: Subject) -> str:
    """5. A beginning alone gives the beginning of the whole."""
    subject.require_causal()
    subject.require("streaming")
    _, whole = _prefix(subject)
    for tokens in (1, whole.shape[1] // 2):
        expect_close(_prefix(subject, tokens)[1], whole[:, :tokens], f"the first {tokens} tokens alone")
    return "beginnings alone"


def independence(subject: Subject) -> str:
    """7. An item does not feel its batch."""
    inputs = inputs_of(subject, 3)
    whole = subject.mechanism(*inputs)
    for item in range(3):
        alone = subject.mechanism(*(x[item : item + 1] for x in inputs))
        expect_close(alone, whole[item : item + 1], "an item alone and in its batch")
    return "batch"


def wide_offsets(subject: Subject) -> str:
    """8. Shapes hold past 2^31 elements."""
    inputs = inputs_of(subject, 1)
    small = subject.mechanism(*inputs)
    batch = BEYOND_INT32 // inputs[0].numel() + 1
    wide = [torch.empty(batch, *x.shape[1:], dtype=x.dtype, device="meta") for x in inputs]
    out = subject.mechanism.to("meta")(*wide)
    expect(out.shape == (batch, *small.shape[1:]), f"shape {tuple(out.shape)} for a batch of {batch}")
    return f"shapes of {wide[0].numel():,} elements on the meta device"


def everything_written(subject: Subject) -> str:
    """9. Every element of the output is written."""
    inputs = inputs_of(subject, 2)
    clean = subject.mechanism(*inputs)
    with poisoned_empty():
        expect_equal(subject.mechanism(*inputs), clean, "with poisoned memory")
    return ""


def refusals(subject: Subject) -> str:
    """10. Wrong dimensions and settings are refused by name."""
    inputs = inputs_of(subject, 2)
    flat = expect_refusal(lambda: subject.mechanism(inputs[0].flatten(), *inputs[1:]), "shape", "a flat input")

    def smoke(settings: dict[str, Any]) -> None:
        changed = Subject(subject.card, subject.device, settings)
        changed.mechanism(*inputs_of(changed, 2))

    return f"{flat}, {refuse_settings(subject.card, smoke)}"


def compilation(subject: Subject) -> str:
    """11. `torch.compile(fullgraph=True)` traces it."""
    return expect_compiles(subject.mechanism, [inputs_of(subject, 2)])


def determinism(subject: Subject) -> str:
    """12. Under `torch.use_deterministic_algorithms` the same call gives the same bits, gradients included."""
    inputs = tuple(x.requires_grad_() for x in inputs_of(subject, 2))
    leaves = (*inputs, *trained(subject.mechanism))
    with deterministic():
        first, second = (subject.mechanism(*inputs) for _ in range(2))
        expect_equal(second, first, "two runs")
        if not subject.can_backward:
            return "forward"
        pairs = [torch.autograd.grad(out.square().sum(), leaves, allow_unused=True) for out in (first, second)]
    for a, b in zip(*pairs, strict=True):
        if a is not None and b is not None:
            expect_equal(b, a, "a gradient of two runs")
    return "forward and backward"


def complexity(subject: Subject) -> str:
    """13. Counted work at 16 and 32 times the first input's tokens grows as declared."""

    def work(times: int) -> float:
        first, *others = inputs_of(subject, 1)
        longer = torch.cat([first] * times, 1 if first.ndim == 3 else -1)
        return counted_work(lambda: subject.mechanism(longer, *others))

    try:
        small, large = work(16), work(32)
    except ValueError as error:
        raise NotApplicable(f"its settings fix the number of tokens: {error}") from error
    return expect_growth(subject.card.complexity, small, large, "16 to 32 times the example's tokens")


CHECKS = {
    1: agreement, 2: gradient_check, 4: causality, 5: one_answer, 7: independence, 8: wide_offsets,
    9: everything_written, 10: refusals, 11: compilation, 12: determinism, 13: complexity,
}  # fmt: skip

REASONS = {
    3: "a layer's inputs carry no padding",
    6: "a layer has weights of its own and no dense attention that it should equal",
    14: "not put into pretrained models by a recipe: it has weights of its own",
    15: "not defined over shards of a sequence",
}
