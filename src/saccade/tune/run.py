"""`tune`: score, search, confirm, measure, write."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saccade.models.passkey import Passkey, PasskeyLikelihood, passkey_likelihoods, passkey_prompts
from saccade.models.tasks import check_head, text_windows
from saccade.plug import Recipe, apply, attention_layers, fingerprint, patchable_layers
from saccade.report import require_packages, write_report
from saccade.tune.caches import exact_cache
from saccade.tune.calibrate import Calibration, score_model
from saccade.tune.candidates import DENSE, Candidate, dense_candidate, every_other, find_candidates
from saccade.tune.confirm import Retrieval, Search, Trial, make_choices, make_recipe
from saccade.tune.crossover import crossover_lengths
from saccade.tune.heldout import ARMS, Runner, measure_passkeys, measure_window
from saccade.tune.pictures import draw_examples, pick_heads
from saccade.tune.plan import Plan, Settings, make_plan
from saccade.tune.progress import Progress
from saccade.tune.report_data import ReportParts, report_data
from saccade.tune.score import CandidateScore
from saccade.tune.search import Assignment, Choices
from saccade.tune.state import RunState
from saccade.tune.texts import Texts, load_texts

CONFIRM_SEED, HELDOUT_SEED = 1000, 4000
"""Added to the seed for the pass keys of the search and for the held-out ones: no key or text is asked for twice."""


@dataclass(frozen=True)
class TuneResult:
    """What a tuning run made.

    Args:
        recipe: The recipe.
        report: Everything measured, as in `report.json`.
        folder: Where `recipe.json`, `report.json` and `report.html` lie.
    """

    recipe: Recipe
    report: dict[str, Any]
    folder: Path


def plan_tuning(
    model: Any, *, context: int = 8192, budget: float = 0.01, quick: bool = False, seed: int = 0,
    mechanisms: Iterable[str] | None = None,
) -> Plan:  # fmt: skip
    """What `tune` with the same arguments would try and about how long; nothing is run beside a short timing.

    Args:
        model: As in `tune`, like the others.
        context: Tokens of a prompt.
        budget: Largest allowed relative rise in perplexity.
        quick: Every other candidate, fewer rounds and pass keys.
        seed: Of the pass keys.
        mechanisms: Only these; None means all that apply.

    Returns:
        The plan.

    Raises:
        ValueError: As `tune`.
    """
    patchable_layers(model)
    settings = Settings.make(context, budget, seed, quick=quick)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise ValueError(f"context={context}: expected at most the model's {limit} positions")
    candidates, left_out = find_candidates(context, mechanisms)
    if quick:
        candidates = [c for c in candidates if c in every_other(candidates)]
    return make_plan(model, settings, candidates, left_out)


def tune(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    text: str | Path | None = None,
    context: int = 8192,
    budget: float = 0.01,
    quick: bool = False,
    seed: int = 0,
    mechanisms: Iterable[str] | None = None,
    name: str = "model",
    command: str = "",
    progress: Progress | None = None,
) -> TuneResult:
    """Find the fastest mixture of mechanisms within a quality budget, and prove it on held-out text.

    A run that was killed continues where it was when called again with the same arguments and `out`; a finished one
    starts anew.

    Args:
        model: A transformers causal language model in eval mode, on its device.
        tokenizer: Its tokenizer.
        out: Folder for `recipe.json`, `report.json`, `report.html` and the state of the run.
        text: A UTF-8 file to calibrate and measure on (its last 40 % are held out); None means the built-in text.
        context: Tokens of a prompt.
        budget: Largest allowed relative rise in perplexity.
        quick: Fewer candidates, rounds and pass keys.
        seed: Of the pass keys.
        mechanisms: Only these; None means all that apply.
        name: What the report calls the model.
        command: The command line, for the report.
        progress: Is told what happens; None is silent.

    Returns:
        Recipe, report and folder.

    Raises:
        ValueError: If an argument is out of range, the text is too short, or the model cannot be patched.
        RuntimeError: If a file cannot be written.
    """
    started = time.time()
    progress = Progress() if progress is None else progress
    require_packages()
    plan = plan_tuning(model, context=context, budget=budget, quick=quick, seed=seed, mechanisms=mechanisms)
    check_head(model)
    texts = load_texts(tokenizer, text, context)
    settings = plan.settings
    arguments = {
        "saccade": version("saccade"), "model": asdict(fingerprint(model)),
        "settings": asdict(settings), "text": texts.source, "tokens": len(texts.heldout_ids),
        "candidates": [candidate.key for candidate in plan.candidates],
    }  # fmt: skip
    state = RunState(Path(out) / "state.json", arguments)
    if state.resumed:
        progress.say(f"continuing the run in {out}")
    job = _Job(model, tokenizer, texts, plan, state, progress)
    scores = job.score()
    candidates = [dense_candidate(str(model.device)), *plan.candidates]
    choices = make_choices(candidates, scores)
    crossings = job.crossovers()
    assignment, trials, kept = job.search(choices, candidates, list(scores), crossings)
    about = {"context": context, "budget": budget, "seed": seed, "made_by": "saccade tune"}
    cache, without = exact_cache(model, candidates[0])
    recipe = make_recipe(model, list(scores), assignment, candidates, about, crossings, cache)
    rounds, splits, keys = job.measure(recipe)
    examples = job.examples(recipe)
    parts = ReportParts(
        name=name, command=command, text=texts.source, plan=plan, candidates=candidates, scores=scores, choices=choices,
        assignment=assignment, trials=trials, kept=kept, recipe=recipe, rounds=rounds, splits=splits, passkeys=keys,
        without_cache=without, examples=examples, elapsed=time.time() - started,
    )  # fmt: skip
    report = report_data(model, parts)
    folder = Path(out)
    write_report(report, folder)
    recipe.save(folder / "recipe.json")
    state.close()
    return TuneResult(recipe, report, folder)


class _Job:
    """The stages of one run, each kept in the state file as it goes."""

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
                prompt = self._keys(((self.settings.context - 8, 0.4),), self.texts.calibration)[0]
                calibration = Calibration.from_passkey(prompt, self.tokenizer)
                score_model(self.model, calibration, list(self.plan.candidates), known, found, self.exact)
        return {layer: known(layer) or [] for layer in layers}

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

    def measure(self, recipe: Recipe) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, list[bool]]]:
        """Held-out rounds, time splits and pass keys of both arms."""
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
        found: dict[str, list[bool]] = {name: [] for name in ARMS}
        prompts = self._keys(self.settings.questions, self.texts.heldout, HELDOUT_SEED)
        with self.progress.stage("pass keys", len(prompts)):
            for number, prompt in enumerate(prompts):
                for name in ARMS:
                    key = f"{number}{name}" + (recipe_key if name == "tuned" else "")
                    ask = partial(measure_passkeys, runner, self.tokenizer, [prompt], name)
                    found[name] += self._kept("heldout keys", key, ask)
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
