"""From predicted damage to a recipe that really holds: try mixtures end to end and back off."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.models.tasks import language_score
from saccade.plug import Choice, LayerRecipe, Recipe, apply, fingerprint
from saccade.tune.candidates import Candidate
from saccade.tune.score import CandidateScore
from saccade.tune.search import Assignment, Choices, evaluate, within

MARGIN = 0.7
"""Share of the budget that the search aims at: held-out text may take a recipe worse than calibration text."""

FIRST_SPEED = 0.6
"""Attention time of the first mixture tried, against dense."""


@dataclass(frozen=True)
class Trial:
    """One mixture measured end to end on calibration text.

    Args:
        seconds: Predicted attention time.
        damage: Predicted damage.
        rise: Measured relative rise in perplexity.
        passkey: Pass keys found by it, by dense, and asked, as text; "" if not asked.
        holds: Whether budget and pass keys hold.
    """

    seconds: float
    damage: float
    rise: float
    passkey: str
    holds: bool


def make_choices(candidates: list[Candidate], scores: dict[str, list[CandidateScore]]) -> Choices:
    """Times and damages of all layers as tensors; a candidate of steady density gets its median time everywhere."""
    rows = list(scores.values())
    seconds = torch.tensor([[score.seconds for score in row] for row in rows], dtype=torch.float64)
    density = torch.tensor([[score.density for score in row] for row in rows], dtype=torch.float64)
    damage = torch.tensor([[score.damage for score in row] for row in rows], dtype=torch.float64)
    steady = (density.amax(0) - density.amin(0)) <= 0.1 * density.amax(0)
    seconds = torch.where(steady, seconds.median(0).values, seconds)
    return Choices(candidates, seconds, damage.transpose(1, 2).contiguous())


def make_recipe(
    model: Any, layers: list[str], assignment: Assignment, candidates: list[Candidate], about: dict[str, Any],
    min_tokens: dict[str, int] | None = None,
) -> Recipe:  # fmt: skip
    """The recipe of an assignment; decoding stays dense."""
    decode = (Choice("all", "dense"),)
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
        retrieve: Pass keys (found by it, found by dense, asked).
    """

    def __init__(
        self,
        choices: Choices,
        budget: float,
        measure: Callable[[Assignment], float],
        retrieve: Callable[[Assignment], tuple[int, int, int]],
    ) -> None:
        self.choices = choices
        self.budget = budget
        self.measure = measure
        self.retrieve = retrieve
        self.trials: list[Trial] = []
        dense = torch.zeros(choices.damage.shape[:2], dtype=torch.int64)
        self.best = evaluate(choices, dense)
        self.kept: Trial | None = None

    def run(self, tries: int, step: Callable[[str], None]) -> Assignment:
        """The fastest assignment that held; dense attention if none did."""
        target = self._first_target()
        low, high = 0.0, math.inf  # damages known to hold, and known not to
        for _ in range(tries):
            assignment = within(self.choices, target)
            if assignment.damage <= 0 or any(abs(trial.damage - assignment.damage) < 1e-12 for trial in self.trials):
                break
            trial = self._try(assignment)
            step(f"perplexity {trial.rise:+.2%}, attention {trial.seconds:.1f} s")
            if trial.holds:
                low = max(low, assignment.damage)
                if assignment.seconds < self.best.seconds:
                    self.best, self.kept = assignment, trial
            else:
                high = min(high, assignment.damage)
            target = self._next_target(trial, low, high)
        return self.best

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

    def _try(self, assignment: Assignment) -> Trial:
        rise = self.measure(assignment)
        holds, passkey = rise <= MARGIN * self.budget, ""
        if holds:
            found, dense, asked = self.retrieve(assignment)
            passkey = f"{found}/{asked}, dense {dense}/{asked}"
            holds = found >= dense
        trial = Trial(assignment.seconds, assignment.damage, rise, passkey, holds)
        self.trials.append(trial)
        return trial

    def _next_target(self, trial: Trial, low: float, high: float) -> float:
        """Perplexity rises about in proportion to damage; stay between what held and what did not."""
        aim = 0.9 * MARGIN * self.budget
        if trial.rise <= 0 or (not trial.holds and trial.rise <= MARGIN * self.budget):
            guess = trial.damage * (0.4 if not trial.holds else 4.0)
        else:
            guess = trial.damage * min(max(aim / trial.rise, 0.05), 8.0)
        if low < guess < high:
            return guess
        return math.sqrt(low * high) if low > 0 and high < math.inf else guess / 2


def rise_of(model: Any, recipe: Recipe, windows: Tensor, dense_nll: float) -> float:
    """Relative rise in perplexity of a recipe on windows `[W, N]`."""
    with apply(model, recipe):
        return math.exp(language_score(model, windows).nll - dense_nll) - 1
