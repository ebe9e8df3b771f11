"""The stage of a tuning run that looks for caches which hold less, beside the prefill mechanisms found before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from saccade.models.passkey import Passkey
from saccade.plug import LayerCache, Recipe, apply
from saccade.tune.cache_read import TailAnswer, tail_answers
from saccade.tune.cache_score import CacheScore, score_caches
from saccade.tune.cache_search import CacheSearch, CacheTrial, make_options, sparse_layers, too_slow, with_caches
from saccade.tune.caches import CacheCandidate
from saccade.tune.calibrate import Calibration, each_layer
from saccade.tune.confirm import Retrieval
from saccade.tune.progress import Progress
from saccade.tune.score import PROBED, LayerInputs

TRIES = 5
"""Assignments of caches that are measured, at most."""

Keep = Callable[[str, str, Callable[[], Any]], Any]
"""`(stage, key, make)`: a result from an earlier run that was killed, or made now and kept."""


@dataclass(frozen=True, eq=False)
class CacheJob:
    """What the stage works with.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        recipe: With the prefill mechanisms that were found; its caches are replaced.
        exact: Dense attention.
        budget: Largest allowed relative rise in perplexity.
        share: Bytes wanted, over those of dense attention.
        context: Tokens of the longest prompts; the text of these is scored.
        calibration: What caches are scored on layer by layer.
        prompts: Pass keys asked for in each trial.
        keep: Keeps results.
        progress: Is told what happens.
    """

    model: Any
    tokenizer: Any
    recipe: Recipe
    exact: Recipe
    budget: float
    share: float
    context: int
    calibration: Calibration
    prompts: list[Passkey]
    keep: Keep
    progress: Progress

    def search(self, candidates: list[CacheCandidate]) -> tuple[Recipe | None, list[CacheTrial], CacheTrial | None]:
        """The recipe with the caches that held, every assignment tried, and the one it is; None if none held."""
        with self.progress.stage("search caches", 1 + TRIES):
            scores = self.score(candidates)
            self.progress.step(f"{len(candidates) - 1} caches in {len(scores)} layers")
            options = make_options(candidates, scores, sparse_layers(self.recipe))
            search = CacheSearch(options, self.budget, self.measure)
            best = search.run(self.share, TRIES, self.progress.step)
        return None if best is None else with_caches(self.recipe, best), search.trials, search.kept

    def score(self, candidates: list[CacheCandidate]) -> dict[str, list[CacheScore]]:
        """Every candidate in every layer, on what the layers see when the recipe prefills."""
        names, sparse = list(self.recipe.layers), sparse_layers(self.recipe)
        needy = [place for place, candidate in enumerate(candidates) if candidate.cache.build().needs_lse]
        found: dict[str, list[dict[str, Any]]] = {}
        history: list[list[CacheScore]] = []

        def see(name: str, inputs: LayerInputs) -> None:
            skipped = dict.fromkeys(needy, "needs all the attention weights of the prefill") if name in sparse else {}
            if len(history) >= PROBED:
                slow = too_slow(history).nonzero()[:, 0].tolist()
                skipped |= dict.fromkeys(slow, "decodes slower than everything as it comes, in the first layers")
            if name in names:
                rows = score_caches(inputs, candidates, names.index(name), len(names), skipped)
                history.append(rows)
                found[name] = [row.to_json() for row in rows]

        def make() -> dict[str, list[dict[str, Any]]]:
            each_layer(self.model, self.calibration, with_caches(self.recipe, [None] * len(names)), see)
            return found

        kept = self.keep("cache scores", self.recipe.to_json(), make)
        return {name: [CacheScore.from_json(row) for row in kept[name]] for name in names}

    def measure(self, caches: list[LayerCache]) -> tuple[Retrieval, float | None]:
        """What caches do beside the recipe's prefill, shortest prompts first, and the part of the bytes they hold."""
        recipe = with_caches(self.recipe, caches)
        answers, share = Retrieval([], [], []), None
        for length in dict.fromkeys(prompt.length for prompt in self.prompts):
            mine, dense = self._ask(recipe, length), self._ask(self.exact, length)
            whole = length == self.context
            pairs = ([answer.likelihood(text=whole) for answer in rows] for rows in (mine, dense))
            answers = answers.join(length, *pairs)
            if whole:
                share = sum(answer.nbytes for answer in mine) / sum(answer.nbytes for answer in dense)
            if not answers.holds:
                break
        return answers, share

    def _ask(self, recipe: Recipe, length: int) -> list[TailAnswer]:
        """The answers to the prompts of a length, with a recipe's prefill and caches."""
        some = [prompt for prompt in self.prompts if prompt.length == length]

        def make() -> list[TailAnswer]:
            with apply(self.model, recipe):
                make_cache = (lambda: recipe.make_cache(self.model)) if recipe.has_cache else (lambda: None)
                return tail_answers(self.model, self.tokenizer, some, make_cache)

        return [TailAnswer(*row) for row in self.keep("cache keys", f"{length} {recipe.to_json()}", make)]


__all__ = ["CacheJob"]
