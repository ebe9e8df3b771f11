"""`tune`: score, search, confirm, measure, write."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saccade.models.tasks import check_head
from saccade.plug import Recipe, fingerprint, patchable_layers
from saccade.report import require_packages, write_report
from saccade.tune.cache_search import trial_rows
from saccade.tune.caches import CacheCandidate, exact_cache, find_cache_candidates, trouble_with_pages
from saccade.tune.candidates import dense_candidate, every_other, fast_dtype, find_candidates, rounded
from saccade.tune.confirm import make_choices, make_recipe
from saccade.tune.job import Job
from saccade.tune.plan import Plan, Settings, make_plan
from saccade.tune.progress import Progress
from saccade.tune.report_data import ReportParts, report_data
from saccade.tune.state import RunState
from saccade.tune.texts import load_texts


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
    mechanisms: Iterable[str] | None = None, cache_budget: float | None = None, keep_dtype: bool = False,
) -> Plan:  # fmt: skip
    """What `tune` with the same arguments would try and about how long; nothing is run beside a short timing.

    Args:
        model: As in `tune`, like the others.
        context: Tokens of a prompt.
        budget: Largest allowed relative rise in perplexity.
        quick: Every other candidate, fewer rounds and pass keys.
        seed: Of the pass keys.
        mechanisms: Only these; None means all that apply.
        cache_budget: Part of the dense cache's bytes to aim for.
        keep_dtype: All attention is computed in the model's dtype.

    Returns:
        The plan.

    Raises:
        ValueError: As `tune`.
    """
    patchable_layers(model)
    settings = Settings.make(context, budget, seed, quick=quick, cache_budget=cache_budget)
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise ValueError(f"context={context}: expected at most the model's {limit} positions")
    candidates, left_out = find_candidates(context, mechanisms)
    if quick:
        candidates = [c for c in candidates if c in every_other(candidates)]
    candidates = candidates if keep_dtype else rounded(candidates, fast_dtype(model))
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    caches: list[CacheCandidate] = []
    if cache_budget is not None:
        trouble = trouble_with_pages(model, dense_candidate(str(model.device)))
        if trouble:
            raise ValueError(f"cache_budget={cache_budget}: expected None: {trouble}")
        caches, held = find_cache_candidates(context, config.num_hidden_layers, rope, quick=quick)
        left_out |= held
    return make_plan(model, settings, candidates, left_out, caches)


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
    cache_budget: float | None = None,
    keep_dtype: bool = False,
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
        cache_budget: Part of the dense cache's bytes to aim for, in (0, 1): caches that evict and pack are searched
            beside the prefill mechanisms, within the one perplexity budget. None means a cache that keeps everything.
        keep_dtype: All attention is computed in the model's dtype. Else that of prompts to an fp32 model may be
            computed in bfloat16, where the device is faster at it, in heads that bear it within the perplexity budget.
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
    plan = plan_tuning(
        model, context=context, budget=budget, quick=quick, seed=seed, mechanisms=mechanisms,
        cache_budget=cache_budget, keep_dtype=keep_dtype,
    )  # fmt: skip
    check_head(model)
    texts = load_texts(tokenizer, text, context)
    settings = plan.settings
    arguments = {
        "saccade": version("saccade"), "model": asdict(fingerprint(model)),
        "settings": asdict(settings), "text": texts.source, "tokens": len(texts.heldout_ids),
        "candidates": [*(candidate.key for candidate in plan.candidates), *(cache.key for cache in plan.caches)],
    }  # fmt: skip
    state = RunState(Path(out) / "state.json", arguments)
    if state.resumed:
        progress.say(f"continuing the run in {out}")
    job = Job(model, tokenizer, texts, plan, state, progress)
    scores = job.score()
    candidates = [dense_candidate(str(model.device)), *plan.candidates]
    choices = make_choices(candidates, scores)
    crossings = job.crossovers()
    assignment, trials, kept = job.search(choices, candidates, list(scores), crossings)
    about = {"context": context, "budget": budget, "seed": seed, "made_by": "saccade tune"}
    cache, without = exact_cache(model, candidates[0])
    recipe = make_recipe(model, list(scores), assignment, candidates, about, crossings, cache)
    cache_trials: list[dict[str, Any]] = []
    if cache_budget is not None:
        smaller, tried, held = job.search_caches(recipe, list(plan.caches))
        recipe, cache_trials = recipe if smaller is None else smaller, trial_rows(tried, held)
    rounds, splits, keys = job.measure(recipe)
    examples = job.examples(recipe)
    parts = ReportParts(
        name=name, command=command, text=texts.source, plan=plan, candidates=candidates, scores=scores, choices=choices,
        assignment=assignment, trials=trials, kept=kept, recipe=recipe, rounds=rounds, splits=splits,
        passkeys=keys["at once"], later=keys.get("later"), without_cache="" if recipe.has_cache else without,
        cache_trials=cache_trials, examples=examples, elapsed=time.time() - started,
    )  # fmt: skip
    report = report_data(model, parts)
    folder = Path(out)
    write_report(report, folder)
    recipe.save(folder / "recipe.json")
    state.close()
    return TuneResult(recipe, report, folder)
