"""Reuse of outputs across denoising steps: the contract, and the state that goes from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from saccade.catalog import Card


@dataclass(frozen=True, eq=False)
class ReuseState:
    """What one module carries from step to step; start every generation with a fresh one.

    Args:
        count: Steps taken.
        output: What the module computed last, or None.
    """

    count: int = 0
    output: Tensor | None = None


class OutputReuse(ABC):
    """Decides, module by module and step by step, whether to compute an output or to use the last one again."""

    card: ClassVar[Card]
    kinds: ClassVar[tuple[str, ...]]
    """What a module may be."""

    @abstractmethod
    def reuses(self, count: int, timestep: float, kind: str) -> bool:
        """Whether step `count` (from 0) at diffusion time `timestep` uses the last output of a module of `kind`."""

    def step(
        self, state: ReuseState | None, timestep: float, kind: str, compute: Callable[[], Tensor]
    ) -> tuple[Tensor, ReuseState]:
        """One module in one denoising step.

        Args:
            state: What the last step returned for this module; None in the first step.
            timestep: Diffusion time of the step, in the unit of the mechanism's window.
            kind: What the module is; see the mechanism.
            compute: Called, without arguments, only if the output is needed anew.

        Returns:
            The output and the state for the next step. A reused output is the very tensor computed before.

        Raises:
            ValueError: If `kind` is unknown.
        """
        state = ReuseState() if state is None else state
        reused = self.reuses(state.count, timestep, kind)
        output = state.output if reused and state.output is not None else compute()
        return output, ReuseState(state.count + 1, output)
