"""From predicted damage to a recipe that really holds: try mixtures end to end and back off."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from saccade.models.passkey import PasskeyLikelihood
from saccade.plug import Choice, LayerCache, LayerRecipe, Recipe, fingerprint
from saccade.tune.candidates import DENSE, Candidate
from saccade.tune.score import CandidateScore
from saccade.tune.search import Assignment, Choices, assign, evaluate, within

MARGIN = 0.7
"""Share of the budget that the search aims at: held-out text may take a recipe worse than calibration text."""

FIRST_SPEED = 0.5
"""Attention time of the first mixture tried, against dense."""

RAISE, BACK_OFF = 8.0, 0.125
"""What the damage is multiplied by while every mixture tried holds, and while none does; in between it is bisected."""

WORTH = 0.05
"""Part of the dense attention time that a mixture must save over the best one that held, to be tried."""

RETRIEVAL_LOSS = 0.1
"""Nats that the answers to the pass keys of a length may lose on average: a lost key is only the end of a slope."""


@dataclass(frozen=True)
class Trial:
    """One mixture measured end to end on calibration text.

    Args:
        seconds: Predicted attention time.
        damage: Predicted damage.
        rise: Measured relative rise in perplexity; None if pass keys of shorter prompts were lost before.
        passkey: Pass keys found by it, by dense, and asked, as text.
        holds: Whether the pass keys and the budget hold.
    """

    seconds: float
    damage: float
    rise: float | None
    passkey: str
    holds: bool


@dataclass(frozen=True)
class Retrieval:
    """What a mixture and dense attention make of prompts with a pass key, shortest first.

    Args:
        lengths: Tokens of each prompt.
        mine: Of the mixture.
        dense: Of dense attention.
    """

    lengths: list[int]
    mine: list[PasskeyLikelihood]
    dense: list[PasskeyLikelihood]

    def join(self, length: int, mine: list[PasskeyLikelihood], dense: list[PasskeyLikelihood]) -> Retrieval:
        """With the answers to the prompts of one more length."""
        return Retrieval([*self.lengths, *[length] * len(mine)], [*self.mine, *mine], [*self.dense, *dense])

    @property
    def losses(self) -> dict[int, float]:
        """For each length, nats that the answers lose on average."""
        return {
            length: mean(d.log_prob for _, d in pairs) - mean(m.log_prob for m, _ in pairs)
            for length, pairs in self._by_length().items()
        }

    @property
    def holds(self) -> bool:
        """At every length as many keys as dense attention finds, and no more than `RETRIEVAL_LOSS`."""
        as_many = all(
            sum(m.found for m, _ in pairs) >= sum(d.found for _, d in pairs) for pairs in self._by_length().values()
        )
        return as_many and max(self.losses.values(), default=0.0) <= RETRIEVAL_LOSS

    @property
    def label(self) -> str:
        """In words."""
        mine, dense = (sum(answer.found for answer in answers) for answers in (self.mine, self.dense))
        worst = max(self.losses.values(), default=0.0)
        return f"{mine}/{len(self.mine)}, dense {dense}/{len(self.dense)}, loses {worst:.2f} nats"

    @property
    def rise(self) -> float | None:
        """Relative rise in perplexity of the prompts whose text was scored; None if there are none."""
        pairs = ((m.nll, d.nll) for m, d in zip(self.mine, self.dense, strict=True))
        rises = [mine - dense for mine, dense in pairs if mine is not None and dense is not None]
        return math.expm1(mean(rises)) if rises else None

    def _by_length(self) -> dict[int, list[tuple[PasskeyLikelihood, PasskeyLikelihood]]]:
        """The answers of both to the prompts of each length."""
        pairs = list(zip(self.lengths, self.mine, self.dense, strict=True))
        return {length: [(m, d) for n, m, d in pairs if n == length] for length in dict.fromkeys(self.lengths)}


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
    min_tokens: dict[str, int] | None = None, cache: LayerCache | None = None,
) -> Recipe:  # fmt: skip
    """The recipe of an assignment; decoding stays dense, on the engine of the first candidate, dense attention.

    Args:
        model: It is for this one.
        layers: Names, as in the assignment.
        assignment: A candidate per layer and head.
        candidates: Dense attention first.
        about: Notes.
        min_tokens: By the candidates' keys, the length below which dense attention runs instead.
        cache: Of every layer; None for transformers' own.

    Returns:
        The recipe.
    """
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
                candidates[number].dtype,
            )
            for number, heads in groups.items()
        )
        recipes[layer] = LayerRecipe(prefill, decode, cache)
    return Recipe(fingerprint(model), recipes, about)


class Search:
    """Looks for the fastest assignment that holds, with few end-to-end runs.

    Args:
        choices: Times and damages.
        budget: Largest allowed relative rise in perplexity.
        retrieve: What an assignment does to prompts with a pass key and to the perplexity of their text.
    """

    def __init__(self, choices: Choices, budget: float, retrieve: Callable[[Assignment], Retrieval]) -> None:
        self.choices = choices
        self.budget = budget
        self.retrieve = retrieve
        self.trials: list[Trial] = []
        dense = torch.zeros(choices.damage.shape[:2], dtype=torch.int64)
        self.best = evaluate(choices, dense)
        self.kept: Trial | None = None

    def run(self, tries: int, step: Callable[[str], None]) -> Assignment:
        """Look for the fastest assignment that finds the pass keys within the budget.

        Args:
            tries: Assignments measured, at most.
            step: Called with a note after each.

        Returns:
            The fastest assignment that held; dense attention if none did.
        """
        dense, target = self.best.seconds, self._first_target()
        for _ in range(tries):
            assignment = within(self.choices, target)
            new = all(abs(trial.damage - assignment.damage) > 1e-12 for trial in self.trials)
            if not new or assignment.damage <= 0 or self.best.seconds - assignment.seconds < WORTH * dense:
                break
            self._try(assignment, step)
            target = self._next_target()
        return self.best

    def _try(self, assignment: Assignment, step: Callable[[str], None]) -> None:
        """Run an assignment end to end and keep what it did."""
        retrieval = self.retrieve(assignment)
        rise = retrieval.rise
        holds = retrieval.holds and rise is not None and rise <= MARGIN * self.budget
        trial = Trial(assignment.seconds, assignment.damage, rise, retrieval.label, holds)
        self.trials.append(trial)
        if holds and assignment.seconds < self.best.seconds:
            self.best, self.kept = assignment, trial
        perplexity = "" if rise is None else f"perplexity {rise:+.2%}, "
        step(f"{perplexity}pass keys {retrieval.label}, attention {assignment.seconds:.1f} s")

    def _first_target(self) -> float:
        """The damage at which attention takes about `FIRST_SPEED` of the dense time, by bisecting the price of it."""
        low, high, scale = -12.0, 12.0, self.best.seconds
        for _ in range(10):
            middle = (low + high) / 2
            slower = assign(self.choices, scale * 10**middle).seconds > FIRST_SPEED * self.best.seconds
            low, high = (low, middle) if slower else (middle, high)
        return assign(self.choices, scale * 10**low).damage

    def _next_target(self) -> float:
        """Further up while all hold, further down while none does, else between what held and what did not."""
        held = max((trial.damage for trial in self.trials if trial.holds), default=0.0)
        lost = min((trial.damage for trial in self.trials if not trial.holds), default=math.inf)
        if held == 0:
            return BACK_OFF * lost
        if lost < math.inf:
            return math.sqrt(held * lost)
        rise = self.trials[-1].rise or 0.0
        return held * (min(RAISE, 0.95 * MARGIN * self.budget / rise) if rise > 0 else RAISE)
