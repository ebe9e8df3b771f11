"""From caches scored layer by layer to ones that hold end to end: aim at the bytes, back off where quality is lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.plug import LayerCache, Recipe
from saccade.plug.cache_recipe import counted, in_words
from saccade.tune.cache_score import CacheScore
from saccade.tune.caches import CacheCandidate, combined
from saccade.tune.candidates import DENSE
from saccade.tune.confirm import MARGIN, Retrieval

AIM = 0.95
"""Part of the wanted bytes that the first trial aims at: what comes after the prompt is held as well."""


SLOWER = 1.1
"""A cache may decode as slowly as everything as it comes, and by this factor more, which the clock may be off by."""


@dataclass(frozen=True, eq=False)
class CacheOptions:
    """What each layer could keep its keys and values in.

    Args:
        caches: The options, everything as it comes first.
        shares: fp64 `[layers, options]`, bytes held over those of dense attention.
        damage: fp64 `[layers, options]`, relative damage to the residual stream; inf where an option cannot be had.
    """

    caches: Sequence[LayerCache]
    shares: Tensor
    damage: Tensor


@dataclass(frozen=True, eq=False)
class CacheAssignment:
    """A cache for each layer, and what it should cost.

    Args:
        chosen: int64 `[layers]`, indices into the options.
        share: Predicted bytes held over those of dense attention.
        damage: Predicted damage, summed.
    """

    chosen: Tensor
    share: float
    damage: float


@dataclass(frozen=True)
class CacheTrial:
    """Caches measured end to end on calibration text.

    Args:
        caches: In words, with the number of layers of each.
        aim: Share of the bytes that was aimed at.
        share: Bytes held at full context over those of dense attention; None if pass keys of shorter prompts were lost.
        rise: Relative rise in perplexity after the prompt, of prefill mechanisms and caches together; None likewise.
        passkey: Pass keys found, as text.
        holds: Whether the pass keys and the budget hold.
    """

    caches: str
    aim: float
    share: float | None
    rise: float | None
    passkey: str
    holds: bool


def make_options(
    candidates: list[CacheCandidate], scores: dict[str, list[CacheScore]], sparse: set[str]
) -> CacheOptions:
    """All options with their predicted bytes and damage.

    An option that evicts and stores in fewer bits has the product of the shares and the sum of the damages. Ruled out
    are options with a part that is `too_slow`, and in layers with a sparse prefill those that need all of the attention
    weights.

    Args:
        candidates: Everything as it comes first.
        scores: For each layer a score per candidate.
        sparse: Layers whose prefill is not dense.

    Returns:
        The options.
    """
    rows = list(scores.values())

    def table(name: str) -> Tensor:
        return torch.tensor([[getattr(score, name) for score in row] for row in rows], dtype=torch.float64)

    slow = too_slow(rows)
    needy = torch.tensor([candidate.cache.build().needs_lse for candidate in candidates])
    refused = slow | (needy & torch.tensor([[name in sparse] for name in scores]))
    refused |= torch.tensor([[bool(score.refused) for score in row] for row in rows])
    damage = table("damage").masked_fill(refused, torch.inf)
    share = table("share")
    caches, parts = zip(*combined(candidates), strict=True)
    return CacheOptions(
        caches,
        torch.stack([share[:, list(places)].prod(1) for places in parts], 1),
        torch.stack([damage[:, list(places)].sum(1) for places in parts], 1),
    )


def too_slow(rows: list[list[CacheScore]]) -> Tensor:
    """Which candidates, bool `[candidates]`, decode slower than keeping everything does, over all layers.

    That is: `SLOWER` times the slower of pages and PyTorch's attention over keys and values that are appended to.
    """
    over = torch.zeros(len(rows[0]), dtype=torch.float64)
    for row in rows:
        limit = SLOWER * max(row[0].seconds, row[0].dense_seconds)
        over += torch.tensor([0.0 if score.refused else score.seconds - limit for score in row], dtype=torch.float64)
    return over > 0


def least_damage(options: CacheOptions, share: float, steps: int = 60) -> CacheAssignment:
    """The assignment of least predicted damage within a share of the bytes, by bisecting the price of bytes.

    Args:
        options: What there is.
        share: Bytes over those of dense attention.
        steps: Of the bisection.

    Returns:
        The assignment; where nothing is small enough, the smallest there is.
    """
    possible = options.shares.masked_fill(options.damage == torch.inf, torch.inf)
    best = _evaluate(options, possible.argmin(1))
    low, high = -12.0, 12.0
    for _ in range(steps if best.share <= share else 0):
        middle = (low + high) / 2
        found = _evaluate(options, (options.damage + 10**middle * options.shares).argmin(1))
        if found.share > share:
            low = middle
            continue
        high = middle
        if found.damage <= best.damage:
            best = found
    return best


def _evaluate(options: CacheOptions, chosen: Tensor) -> CacheAssignment:
    share, damage = (x.gather(1, chosen[:, None]) for x in (options.shares, options.damage))
    return CacheAssignment(chosen, float(share.mean()), float(damage.sum()))


def with_caches(recipe: Recipe, caches: Sequence[LayerCache | None]) -> Recipe:
    """The recipe with a cache for each of its layers, None for transformers' own."""
    layers = {
        name: replace(layer, cache=cache) for (name, layer), cache in zip(recipe.layers.items(), caches, strict=True)
    }
    return replace(recipe, layers=layers)


def sparse_layers(recipe: Recipe) -> set[str]:
    """Layers whose prefill is not dense in all heads."""
    return {name for name, layer in recipe.layers.items() if any(choice.mechanism != DENSE for choice in layer.prefill)}


class CacheSearch:
    """Looks for caches that hold no more than a part of the bytes, with few end-to-end runs.

    Args:
        options: What each layer could have.
        budget: Largest allowed relative rise in perplexity, the one that prefill mechanisms share.
        measure: What an assignment does to prompts with a pass key and to the text around them, and the share of the
            bytes that it holds at full context (None if it was not asked that far).
    """

    def __init__(
        self, options: CacheOptions, budget: float,
        measure: Callable[[list[LayerCache]], tuple[Retrieval, float | None]],
    ) -> None:  # fmt: skip
        self.options = options
        self.budget = budget
        self.measure = measure
        self.trials: list[CacheTrial] = []
        self.kept: CacheTrial | None = None
        self.best: list[LayerCache] | None = None

    def run(self, share: float, tries: int, step: Callable[[str], None]) -> list[LayerCache] | None:
        """Look for caches that hold at most `share` of the bytes; failing that, as few as the tries find.

        Args:
            share: Bytes over those of dense attention.
            tries: Assignments measured, at most.
            step: Called with a note after each.

        Returns:
            A cache for each layer; None if nothing held.
        """
        aim, held, lost, seen = AIM * share, 1.0, 0.0, list[Tensor]()
        for _ in range(tries):
            assignment = least_damage(self.options, aim)
            if assignment.share >= 1 or any(torch.equal(assignment.chosen, other) for other in seen):
                break
            seen.append(assignment.chosen)
            trial = self._try(assignment, aim, step)
            if trial.holds and trial.share is not None:
                if trial.share <= share:
                    break
                held = aim
                aim = max(aim * AIM * share / trial.share, math.sqrt(lost * held))
            else:
                lost = aim
                aim = math.sqrt(lost * held)
        return self.best

    def _try(self, assignment: CacheAssignment, aim: float, step: Callable[[str], None]) -> CacheTrial:
        """Run an assignment end to end and keep what it did."""
        caches = [self.options.caches[number] for number in assignment.chosen.tolist()]
        retrieval, share = self.measure(caches)
        rise = retrieval.rise
        holds = retrieval.holds and rise is not None and rise <= MARGIN * self.budget
        words = counted(in_words(cache.build()) for cache in caches)
        trial = CacheTrial(words, aim, share, rise, retrieval.label, holds)
        self.trials.append(trial)
        if holds and share is not None and (self.kept is None or share < (self.kept.share or 1.0)):
            self.best, self.kept = caches, trial
        bytes_held = "" if share is None else f"{share:.0%} of the bytes, "
        perplexity = "" if rise is None else f"perplexity {rise:+.2%}, "
        step(f"{bytes_held}{perplexity}pass keys {retrieval.label}")
        return trial


def trial_rows(trials: Sequence[CacheTrial], kept: CacheTrial | None) -> list[dict[str, Any]]:
    """For the report; `kept` is the one in the recipe."""
    return [
        {"caches": t.caches, "aim": t.aim, "share": t.share, "rise": t.rise, "passkey": t.passkey, "holds": t.holds,
         "kept": t is kept}
        for t in trials
    ]  # fmt: skip


__all__ = [
    "CacheAssignment", "CacheOptions", "CacheSearch", "CacheTrial", "least_damage", "make_options", "sparse_layers",
    "too_slow", "trial_rows", "with_caches",
]  # fmt: skip
