"""The stages of a tuning run, each kept in the state file as it goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

from saccade.models.passkey import Passkey, PasskeyLikelihood, passkey_likelihoods, passkey_prompts
from saccade.models.tasks import text_windows
from saccade.plug import Recipe, apply, attention_layers
from saccade.tune.cache_search import CacheTrial
from saccade.tune.cache_stage import CacheJob
from saccade.tune.caches import CacheCandidate
from saccade.tune.calibrate import Calibration, score_model
from saccade.tune.candidates import DENSE, Candidate, dense_candidate
from saccade.tune.confirm import Retrieval, Search, Trial, make_recipe
from saccade.tune.crossover import crossover_lengths
from saccade.tune.heldout import ARMS, Runner, measure_later, measure_passkeys, measure_window
from saccade.tune.pictures import draw_examples, pick_heads
from saccade.tune.plan import Plan
from saccade.tune.progress import Progress
from saccade.tune.score import CandidateScore
from saccade.tune.search import Assignment, Choices
from saccade.tune.state import RunState
from saccade.tune.texts import Texts

CONFIRM_SEED, HELDOUT_SEED = 1000, 5000
"""Added to the seed for the pass keys of the search and for the held-out ones: no key or text is asked for twice."""


class Job:
    """The stages of one run, each kept in the state file as it goes.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        texts: To calibrate and to measure on.
        plan: What is to be done.
        state: Where results are kept.
        progress: Is told what happens.
    """

    def __init__(
        self, model: Any, tokenizer: Any, texts: Texts, plan: Plan, state: RunState, progress: Progress
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.texts = texts
        self.plan = plan
        self.settings = plan.settings
        self.state = state
        self.progress = progress
        self.exact = Recipe.uniform(model, DENSE, dense_candidate(str(model.device)).settings)

    def score(self) -> dict[str, list[CandidateScore]]:
        """Scores of every layer, dense attention first."""
        layers = list(attention_layers(self.model))

        def known(layer: str) -> list[CandidateScore] | None:
            rows = self.state.get("scores", layer)
            return None if rows is None else [CandidateScore.from_json(row) for row in rows]

        with self.progress.stage("score candidates per layer", len(layers)):
            done = [layer for layer in layers if known(layer) is not None]
            for _ in done:
                self.progress.step()

            def found(layer: str, rows: list[CandidateScore]) -> None:
                self.state.put("scores", layer, [row.to_json() for row in rows])
                self.progress.step(f"{len(rows) - 1} candidates in {layer}")

            if len(done) < len(layers):
                score_model(self.model, self._calibration(), list(self.plan.candidates), known, found, self.exact)
        return {layer: known(layer) or [] for layer in layers}

    def _calibration(self) -> Calibration:
        """The prompt that candidates and caches are scored on, layer by layer."""
        prompt = self._keys(((self.settings.context - 8, 0.4),), self.texts.calibration)[0]
        return Calibration.from_passkey(prompt, self.tokenizer)

    def _keys(self, questions: Iterable[tuple[int, float]], haystack: str, offset: int = 0) -> list[Passkey]:
        """A prompt for each (tokens, depth), each with a key and a piece of text of its own."""
        first = self.settings.seed + offset
        return [
            passkey_prompts(self.tokenizer, (length,), (depth,), first + number, haystack)[0]
            for number, (length, depth) in enumerate(questions)
        ]

    def search(
        self, choices: Choices, candidates: list[Candidate], layers: list[str], min_tokens: dict[str, int]
    ) -> tuple[Assignment, list[Trial], Trial | None]:
        """The fastest assignment that holds on calibration text, every one tried, and the one it is (None: dense)."""
        prompts = self._keys(self.settings.trial_questions, self.texts.calibration, CONFIRM_SEED)

        def recipe_of(assignment: Assignment) -> Recipe:
            return make_recipe(self.model, layers, assignment, candidates, {}, min_tokens)

        def ask(name: str, recipe: Recipe, length: int) -> list[PasskeyLikelihood]:
            some = [prompt for prompt in prompts if prompt.length == length]
            whole = length == self.settings.context
            make = partial(passkey_likelihoods, self.model, self.tokenizer, some, score_text=whole)
            with apply(self.model, recipe):
                return [PasskeyLikelihood(*row) for row in self._kept("keys", f"{length} {name}", make)]

        def retrieve(assignment: Assignment) -> Retrieval:
            name, recipe = _name(assignment), recipe_of(assignment)
            answers = Retrieval([], [], [])
            for length in dict.fromkeys(prompt.length for prompt in prompts):  # the shortest first, which cost least
                answers = answers.join(length, ask(name, recipe, length), ask("dense", self.exact, length))
                if not answers.holds:
                    break
            return answers

        with self.progress.stage("search and confirm", self.settings.confirmations):
            search = Search(choices, self.settings.budget, retrieve)
            best = search.run(self.settings.confirmations, self.progress.step)
        return best, search.trials, search.kept

    def _kept(self, stage: str, key: str, make: Any) -> Any:
        """A result from the state file, or made now and kept there."""
        value = self.state.get(stage, key)
        if value is None:
            value = make()
            self.state.put(stage, key, value)
        return value

    def crossovers(self) -> dict[str, int]:
        """For each candidate the length below which dense attention is faster."""
        ids, candidates = self.texts.calibration_ids[: self.settings.context], list(self.plan.candidates)
        make = partial(crossover_lengths, self.model, ids, candidates, self.settings.context, self.exact)
        return self._kept("crossover", "all", make)

    def search_caches(
        self, recipe: Recipe, candidates: list[CacheCandidate]
    ) -> tuple[Recipe | None, list[CacheTrial], CacheTrial | None]:
        """The recipe with caches that hold no more than was asked for, if some held; all tried, and the one it is."""
        settings = self.settings
        if settings.cache_budget is None:
            raise ValueError("cache_budget=None: expected a part of the dense cache's bytes")
        prompts = self._keys(settings.trial_questions, self.texts.calibration, CONFIRM_SEED)
        stage = CacheJob(
            self.model, self.tokenizer, recipe, self.exact, settings.budget, settings.cache_budget, settings.context,
            self._calibration(), prompts, self._kept, self.progress,
        )  # fmt: skip
        return stage.search(candidates)

    def measure(self, recipe: Recipe) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, dict[str, list[bool]]]]:
        """Held-out rounds, time splits and pass keys of both arms, asked at once and, if a cache is cut, later."""
        runner = Runner(self.model, recipe)
        windows = text_windows(self.texts.heldout_ids, self.settings.context, self.settings.rounds)
        recipe_key = recipe.to_json()
        with self.progress.stage("measure on held-out text", len(windows) + len(ARMS)):
            splits = {}
            for name in ARMS:  # also warms both arms up
                splits[name] = self._kept(
                    "split", name + recipe_key, lambda arm=name: asdict(runner.split(windows[:1], arm))
                )
                self.progress.step(f"time split, {name}")
            rounds = []
            for number, window in enumerate(windows):
                row = self._kept("rounds", f"{number}{recipe_key}", partial(measure_window, runner, window, number))
                rounds.append(row)
                times = " and ".join(f"{row[name]['prefill']:.1f} s {name}" for name in ARMS)
                self.progress.step(f"round {number + 1}: prefill {times}")
        asks = {"at once": measure_passkeys} | ({"later": measure_later} if runner.cuts else {})
        found: dict[str, dict[str, list[bool]]] = {how: {name: [] for name in ARMS} for how in asks}
        prompts = self._keys(self.settings.questions, self.texts.heldout, HELDOUT_SEED)
        with self.progress.stage("pass keys", len(prompts)):
            for number, prompt in enumerate(prompts):
                for how, name in product(asks, ARMS):
                    key = f"{number}{how}{name}" + (recipe_key if name == "tuned" else "")
                    ask = partial(asks[how], runner, self.tokenizer, [prompt], name)
                    found[how][name] += self._kept("heldout keys", key, ask)
                self.progress.step(f"{prompt.length:,} tokens, depth {prompt.depth:.0%}")
        return rounds, splits, found

    def examples(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Pictures of some heads on held-out text."""
        ids = self.texts.heldout_ids[: self.settings.picture]
        with self.progress.stage("pictures and report", 1):
            make = partial(draw_examples, self.model, ids, pick_heads(recipe), self.exact)
            pictures: list[dict[str, Any]] = self._kept("examples", recipe.to_json(), make)
            self.progress.step()
        return pictures


def _name(assignment: Assignment) -> str:
    """A key for an assignment."""
    return "".join(chr(48 + number) for number in assignment.chosen.flatten().tolist())
