"""The laws for reuse of outputs across denoising steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.laws.base import expect, expect_equal, expect_refusal
from saccade.laws.settings import refuse_settings
from saccade.laws.subjects import Subject
from saccade.mechanisms.diffusion.base import ReuseState

STEPS = 30


class Denoiser:
    """A generation of `STEPS` steps from time 1000 to 0 by a toy module, one for each kind; counts what it computes."""

    def __init__(self, mechanism: Any, kinds: tuple[str, ...]) -> None:
        self.mechanism, self.kinds, self.computed = mechanism, kinds, 0
        self.states: dict[str, ReuseState | None] = dict.fromkeys(kinds)
        generator = torch.Generator().manual_seed(0)
        self.x = {kind: torch.randn(2, 5, generator=generator) for kind in kinds}

    def run(self, first: int = 0, last: int = STEPS) -> list[Tensor]:
        """Steps `first` to `last`; the latents after each step of each kind."""
        trace = []
        for step in range(first, last):
            time = 1000 * (1 - step / STEPS)
            for kind in self.kinds:
                out, self.states[kind] = self.mechanism.step(
                    self.states[kind], time, kind, lambda kind=kind, time=time: self._module(kind, time)
                )
                self.x[kind] = self.x[kind] + 0.1 * out
                trace.append(self.x[kind])
        return trace

    def _module(self, kind: str, time: float) -> Tensor:
        self.computed += 1
        return torch.tanh(self.x[kind] * (1 + time / 1000))


class AlwaysCompute:
    """What every reuse is measured against."""

    def step(self, state: Any, timestep: float, kind: str, compute: Any) -> tuple[Tensor, Any]:  # noqa: ARG002
        """Compute."""
        return compute(), state


def _expect_same(got: list[Tensor], wanted: list[Tensor], what: str) -> None:
    for number, (x, y) in enumerate(zip(got, wanted, strict=True)):
        expect_equal(x, y, f"{what}, latents {number}")


def one_answer(subject: Subject) -> str:
    """5. A generation stopped and continued from its state = one without a stop."""
    whole = Denoiser(subject.mechanism, subject.mechanism.kinds).run()
    stopped = Denoiser(subject.mechanism, subject.mechanism.kinds)
    _expect_same(stopped.run(0, 7) + stopped.run(7, 8) + stopped.run(8), whole, "stopped and continued")
    return "stopped and continued"


def budgets(subject: Subject) -> str:
    """6. Exact where the card says so; the example computes less; a reused output is the very tensor."""
    kinds = subject.mechanism.kinds
    dense = Denoiser(AlwaysCompute(), kinds)
    trace = dense.run()
    if subject.card.exact is not None:
        exact = Subject(subject.card, subject.device, subject.card.exact(STEPS)).mechanism
        _expect_same(Denoiser(exact, kinds).run(), trace, f"at {subject.card.exact_when}")
    sparse = Denoiser(subject.mechanism, kinds)
    out = sparse.run()
    expect(0 < sparse.computed < dense.computed, f"computed {sparse.computed} of {dense.computed} outputs")
    error = float((out[-1] - trace[-1]).norm() / trace[-1].norm())
    expect(error == error and error < 1, f"error {error:.3g} after reuse")  # noqa: PLR0124  not NaN
    return f"computes {sparse.computed} of {dense.computed} outputs, error {error:.3f}"


def independence(subject: Subject) -> str:
    """7. A module does not feel what others reuse."""
    kinds = subject.mechanism.kinds
    together = Denoiser(subject.mechanism, kinds).run()
    for number, kind in enumerate(kinds):
        alone = Denoiser(subject.mechanism, kinds)
        alone.kinds = (kind,)
        _expect_same(alone.run(), together[number :: len(kinds)], f"{kind} alone and among others")
    return "modules"


def refusals(subject: Subject) -> str:
    """10. Unknown kinds of module and bad settings are refused by name."""

    def step(kind: str) -> None:
        subject.mechanism.step(None, 500.0, kind, lambda: torch.zeros(1))

    def smoke(settings: dict[str, Any]) -> None:
        Denoiser(Subject(subject.card, subject.device, settings).mechanism, subject.mechanism.kinds).run()

    done = expect_refusal(lambda: step("no such kind"), "kind='no such kind'", "an unknown kind of module")
    return f"{done}, {refuse_settings(subject.card, smoke)}"


def determinism(subject: Subject) -> str:
    """12. Two generations are equal, the second not touched by the first."""
    first, second = (Denoiser(subject.mechanism, subject.mechanism.kinds).run() for _ in range(2))
    _expect_same(second, first, "two generations")
    return ""


CHECKS = {5: one_answer, 6: budgets, 7: independence, 10: refusals, 12: determinism}

REASONS = {
    1: "it computes nothing itself: law 6 checks that what it reuses is bit-equal",
    2: "it computes nothing itself: outputs pass through untouched, and with them their graph",
    3: "it does not look into an output, padded or not",
    4: "it is causal in steps by its interface: it is given one step at a time",
    8: "it computes no offsets",
    9: "it allocates nothing",
    11: "it decides in Python, between the calls of a compiled module",
    13: "its work is what it leaves to be computed, which law 6 counts",
    14: "recipes choose attention in language models; this wraps modules of a diffusion model",
    15: "not defined over shards of a sequence",
}
