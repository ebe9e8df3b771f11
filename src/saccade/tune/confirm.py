"""From predicted damage to a recipe that really holds: try mixtures end to end and back off."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.models.tasks import language_score
from saccade.plug import Choice, LayerRecipe, Recipe, apply, fingerprint
from saccade.tune.candidates import DENSE, Candidate
from saccade.tune.score import CandidateScore
from saccade.tune.search import Assignment, Choices, evaluate, within

MARGIN = 0.7
"""Share of the budget that the search aims at: held-out text may take a recipe worse than calibration text."""

FIRST_SPEED = 0.57
"""Attention time of the first mixture tried, against dense."""

RETRIEVAL_LOSS = 0.1
"""Nats that the answers to the pass keys of a length may lose on average: a lost key is only the end of a slope."""

BACK_OFF, BACK_OFFS = 0.3, 2
"""If no mixture finds the pass keys: the part of the least damage tried that is tried next, and how often."""


@dataclass(frozen=True)
class Trial:
    """One mixture measured end to end on calibration text.

    Args:
        seconds: Predicted attention time.
        damage: Predicted damage.
        rise: Measured relative rise in perplexity.
        passkey: Pass keys found by it, by dense, and asked, as text; "" if not asked.
        holds: Whether the budget holds and, if asked, the pass keys.
    """

    seconds: float
    damage: float
    rise: float
    passkey: str
    holds: bool


@dataclass(frozen=True)
class Retrieval:
    """The answers to pass keys, each as (log-probability, found): of a mixture and of dense attention.

    Args:
        lengths: Tokens of each prompt.
        mine: Of the mixture.
        dense: Of dense attention.
    """

    lengths: list[int]
    mine: list[tuple[float, bool]]
    dense: list[tuple[float, bool]]

    @property
    def losses(self) -> dict[int, float]:
        """For each length, nats that the answers lose on average."""
        return {n: self._mean(self.dense, n, 0) - self._mean(self.mine, n, 0) for n in dict.fromkeys(self.lengths)}

    @property
    def holds(self) -> bool:
        """At every length as many keys as dense attention finds, and no more than `RETRIEVAL_LOSS`."""
        as_many = all(self._mean(self.mine, n, 1) >= self._mean(self.dense, n, 1) for n in self.losses)
        return as_many and max(self.losses.values(), default=0.0) <= RETRIEVAL_LOSS

    @property
    def label(self) -> str:
        """In words."""
        mine, dense = (sum(found for _, found in answers) for answers in (self.mine, self.dense))
        worst = max(self.losses.values(), default=0.0)
        return f"{mine}/{len(self.mine)}, dense {dense}/{len(self.dense)}, loses {worst:.2f} nats"

    def _mean(self, answers: list[tuple[float, bool]], length: int, place: int) -> float:
        values = [float(answer[place]) for n, answer in zip(self.lengths, answers, strict=True) if n == length]
        return sum(values) / len(values)


def make_choices(candidates: list[Candidate], scores: dict[str, list[CandidateScore]]) -> Choices:
    """Times and damages of all heads as tensors.

    A layer's time is shared out over its heads by how many pairs each computes. A candidate of steady density gets its
    median time in all layers, which takes the noise of the clock out.

    Args:
        candidates: Dense attention first.
        scores: For each layer, a score per candidate.

    Returns:
        The choices.
    """
    rows = list(scores.values())

    def table(name: str) -> Tensor:
        return torch.tensor([[getattr(score, name) for score in row] for row in rows], dtype=torch.float64)

    seconds, select = table("seconds"), table("select_seconds")
    density, damage = table("density").transpose(1, 2), table("damage").transpose(1, 2)
    whole = density.mean(1)
    steady = (whole.amax(0) - whole.amin(0)) <= 0.1 * whole.amax(0)
    seconds = torch.where(steady, seconds.median(0).values, seconds)
    heads = density.shape[1]
    share = density / density.sum(1, keepdim=True).clamp(min=1e-12)
    per_head = select[:, None] / heads + (seconds - select).clamp(min=0)[:, None] * share
    return Choices(candidates, per_head, damage.contiguous())


def make_recipe(
    model: Any, layers: list[str], assignment: Assignment, candidates: list[Candidate], about: dict[str, Any],
    min_tokens: dict[str, int] | None = None,
) -> Recipe:  # fmt: skip
    """The recipe of an assignment; decoding stays dense, on the engine of the first candidate, dense attention."""
    decode = (Choice("all", DENSE, candidates[0].settings),)
    recipes = {}
    for layer, chosen in zip(layers, assignment.chosen.tolist(), strict=True):
        groups = {number: tuple(h for h, c in enumerate(chosen) if c == number) for number in sorted(set(chosen))}
        prefill = tuple(
            Choice(
                "all" if len(groups) == 1 else heads,
                candidates[number].mechanism,
                candidates[number].settings,
                (min_tokens or {}).get(candidates[number].key, 0),
            )
            for number, heads in groups.items()
        )
        recipes[layer] = LayerRecipe(prefill, decode)
    return Recipe(fingerprint(model), recipes, about)


class Search:
    """Looks for the fastest assignment that holds, with few end-to-end runs.

    Args:
        choices: Times and damages.
        budget: Largest allowed relative rise in perplexity.
        measure: Perplexity rise of an assignment, measured.
        retrieve: What an assignment does to the pass keys.
    """

    def __init__(
        self,
        choices: Choices,
        budget: float,
        measure: Callable[[Assignment], float],
        retrieve: Callable[[Assignment], Retrieval],
    ) -> None:
        self.choices = choices
        self.budget = budget
        self.measure = measure
        self.retrieve = retrieve
        self.trials: list[Trial] = []
        self.assignments: list[Assignment] = []
        dense = torch.zeros(choices.damage.shape[:2], dtype=torch.int64)
        self.best = evaluate(choices, dense)
        self.kept: Trial | None = None

    def run(self, tries: int, step: Callable[[str], None]) -> Assignment:
        """Look for the fastest assignment within the budget, then make sure that it retrieves.

        Args:
            tries: Perplexities measured, at most.
            step: Called with a note after each.

        Returns:
            The fastest assignment that held; dense attention if none did.
        """
        target = self._first_target()
        for _ in range(tries):
            if not self._try(target, step):
                break
            target = self._next_target()
        for _ in range(BACK_OFFS):
            least = min((trial.damage for trial in self.trials), default=0.0)
            if self._settle(step) or not self._try(BACK_OFF * least, step):
                break
        else:
            self._settle(step)
        return self.best

    def _try(self, target: float, step: Callable[[str], None]) -> bool:
        """Measure the fastest assignment within a predicted damage; False if that is dense or was tried."""
        assignment = within(self.choices, target)
        if assignment.damage <= 0 or any(abs(t.damage - assignment.damage) < 1e-12 for t in self.trials):
            return False
        rise = self.measure(assignment)
        self.trials.append(Trial(assignment.seconds, assignment.damage, rise, "", rise <= MARGIN * self.budget))
        self.assignments.append(assignment)
        step(f"perplexity {rise:+.2%}, attention {assignment.seconds:.1f} s")
        return True

    def _settle(self, step: Callable[[str], None]) -> bool:
        """Ask trials within the budget for pass keys, fastest first, until one does as well as dense."""
        for place in sorted(range(len(self.trials)), key=lambda n: self.trials[n].seconds):
            trial = self.trials[place]
            if not trial.holds or trial.seconds >= self.best.seconds:
                continue
            retrieval = self.retrieve(self.assignments[place])
            trial = replace(trial, passkey=retrieval.label, holds=retrieval.holds)
            self.trials[place] = trial
            step(f"pass keys {trial.passkey}")
            if trial.holds:
                self.best, self.kept = self.assignments[place], trial
                return True
        return False

    def _first_target(self) -> float:
        """A damage at which attention takes about `FIRST_SPEED` of the dense time."""
        low, high = 1e-9, float(self.choices.damage.amax(2).sum())
        wanted = FIRST_SPEED * self.best.seconds
        for _ in range(14):
            middle = math.sqrt(low * high)
            if within(self.choices, middle, steps=16).seconds > wanted:
                low = middle
            else:
                high = middle
        return high

    def _next_target(self) -> float:
        """Where a power law through the last two trials meets the aim, between what held and what did not."""
        aim = 0.95 * MARGIN * self.budget
        last = self.trials[-1]
        low = max((t.damage for t in self.trials if t.holds), default=0.0)
        high = min((t.damage for t in self.trials if not t.holds), default=math.inf)
        if last.rise <= 0:
            guess = 4 * last.damage
        else:
            guess = last.damage * min(max((aim / last.rise) ** (1 / self._slope()), 0.05), 8.0)
        if low < guess < high:
            return guess
        return math.sqrt(low * high) if 0 < low < high < math.inf else guess / 2

    def _slope(self) -> float:
        """How the logarithm of the rise grows with that of the damage: 1 until two trials tell."""
        known = [(math.log(t.damage), math.log(t.rise)) for t in self.trials[-2:] if t.rise > 0]
        if len(known) < 2 or known[0][0] == known[1][0]:
            return 1.0
        return min(max((known[1][1] - known[0][1]) / (known[1][0] - known[0][0]), 0.4), 1.5)


def rise_of(model: Any, recipe: Recipe, windows: Tensor, dense_nll: float) -> float:
    """Relative rise in perplexity of a recipe on windows `[W, N]`."""
    with apply(model, recipe):
        return math.exp(language_score(model, windows).nll - dense_nll) - 1
