"""Everything a tuning run found, as the plain data that `report.json` holds and the page is drawn from."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from saccade.bench.measure import describe_machine
from saccade.plug import Recipe, fingerprint
from saccade.plug.cache_recipe import in_words
from saccade.report.page import megabytes, percent, seconds, signed
from saccade.tune.candidates import Candidate
from saccade.tune.confirm import Trial
from saccade.tune.heldout import ARMS
from saccade.tune.plan import Plan
from saccade.tune.score import SAMPLED, CandidateScore
from saccade.tune.search import Assignment, Choices, frontier

VERSION = 1
PREFILL_TARGET = 1.2


@dataclass(frozen=True, eq=False)
class ReportParts:
    """What the stages of a run left."""

    name: str
    command: str
    text: str
    plan: Plan
    candidates: list[Candidate]
    scores: dict[str, list[CandidateScore]]
    choices: Choices
    assignment: Assignment
    trials: list[Trial]
    kept: Trial | None
    recipe: Recipe
    rounds: list[dict[str, Any]]
    splits: dict[str, dict[str, float]]
    passkeys: dict[str, list[bool]]
    later: dict[str, list[bool]] | None
    without_cache: str
    cache_trials: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    elapsed: float


def report_data(model: Any, parts: ReportParts) -> dict[str, Any]:
    """The report."""
    settings = parts.plan.settings
    print_ = fingerprint(model)
    summary = summarise(parts)
    return {
        "version": VERSION,
        "saccade": version("saccade"),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": parts.command,
        "elapsed_seconds": parts.elapsed,
        "machine": describe_machine(str(model.device)).to_json(),
        "model": {
            "name": parts.name, "architecture": print_.architecture, "layers": len(parts.scores), "heads": print_.heads,
            "kv_heads": print_.kv_heads, "head_dim": print_.head_dim, "dtype": str(model.dtype).removeprefix("torch."),
            "weights": print_.weights,
        },
        "text": parts.text,
        "settings": {
            "context": settings.context, "budget": settings.budget, "seed": settings.seed,
            "cache_budget": settings.cache_budget, "confirmations": settings.confirmations, "rounds": settings.rounds,
            "sampled": SAMPLED,
        },
        "summary": summary,
        "targets": targets(parts, summary),
        "heldout": heldout(parts, summary),
        "time_split": [
            {"name": name, "kernel": split["kernel"], "select": split["select"], "rest": split["rest"]}
            for name, split in parts.splits.items()
        ],
        "layers": layers(parts),
        "candidates": candidate_rows(parts),
        "left_out": parts.plan.left_out,
        "search": search(parts),
        "examples": parts.examples,
    }  # fmt: skip


def _median(parts: ReportParts, arm: str, key: str) -> float:
    return statistics.median(row[arm][key] for row in parts.rounds)


def summarise(parts: ReportParts) -> dict[str, Any]:
    """The figures everything else is about."""
    ratios = [row["dense"]["prefill"] / row["tuned"]["prefill"] for row in parts.rounds]
    nll = {arm: statistics.fmean(row[arm]["nll"] for row in parts.rounds) for arm in ARMS}
    decode = {arm: statistics.median(x for row in parts.rounds for x in row[arm]["decode"]) for arm in ARMS}
    return {
        "prefill_speedup": statistics.median(ratios),
        "prefill_speedup_each": ratios,
        "prefill_seconds": {arm: _median(parts, arm, "prefill") for arm in ARMS},
        "decode_seconds": decode,
        "perplexity": {arm: math.exp(nll[arm]) for arm in ARMS},
        "perplexity_rise": math.exp(nll["tuned"] - nll["dense"]) - 1,
        "kl": statistics.fmean(row["kl"] for row in parts.rounds),
        "peak_bytes": {arm: parts.splits[arm]["peak_bytes"] for arm in ARMS},
        "kv_bytes": {arm: parts.rounds[0][arm]["kv_bytes"] for arm in ARMS},
        "cache": {arm: parts.rounds[0][arm]["cache"] for arm in ARMS},
        "passkey": {arm: sum(parts.passkeys[arm]) for arm in ARMS},
        "passkeys_asked": len(parts.passkeys["dense"]),
        "after_the_cut": _after_the_cut(parts),
    }


def _after_the_cut(parts: ReportParts) -> dict[str, Any] | None:
    """What was read over caches that hold less than everything; None if none do."""
    if parts.later is None:
        return None
    tails = [row["tail"] for row in parts.rounds]
    nll = {arm: statistics.fmean(tail[arm]["nll"] for tail in tails) for arm in ARMS}
    return {
        "tokens": tails[0]["dense"]["tokens"],
        "perplexity": {arm: math.exp(nll[arm]) for arm in ARMS},
        "perplexity_rise": math.exp(nll["tuned"] - nll["dense"]) - 1,
        "kv_bytes": {arm: tails[0][arm]["kv_bytes"] for arm in ARMS},
        "passkey": {arm: sum(parts.later[arm]) for arm in ARMS},
    }


def passkey_table(parts: ReportParts) -> list[dict[str, Any]]:
    """Per length and depth, what each arm found."""
    asked = parts.plan.settings.questions
    rows = []
    for length in sorted({length for length, _ in asked}):
        cells = []
        for depth in _depths(parts):
            places = [place for place, question in enumerate(asked) if question == (length, depth)]
            found = {arm: sum(parts.passkeys[arm][place] for place in places) for arm in ARMS}
            cells.append({"tries": len(places)} | found)
        rows.append({"tokens": length, "cells": cells})
    return rows


def _depths(parts: ReportParts) -> list[float]:
    return sorted({depth for _, depth in parts.plan.settings.questions})


def targets(parts: ReportParts, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What was wanted, what came out, and whether that is enough."""
    by_length = [
        sum(cell["tuned"] for cell in row["cells"]) >= sum(cell["dense"] for cell in row["cells"])
        for row in passkey_table(parts)
    ]
    budget = parts.plan.settings.budget
    decoding = summary["decode_seconds"]["tuned"] / summary["decode_seconds"]["dense"]
    rows = [
        {"name": "prefill, against dense", "wanted": f"at least {PREFILL_TARGET}×",
         "got": f"{summary['prefill_speedup']:.2f}×", "met": summary["prefill_speedup"] >= PREFILL_TARGET},
        {"name": "perplexity, against dense", "wanted": f"at most {percent(budget)} more",
         "got": signed(summary["perplexity_rise"]), "met": summary["perplexity_rise"] <= budget},
        {"name": "pass keys found", "wanted": f"no fewer than dense ({summary['passkey']['dense']}) at any length",
         "got": f"{summary['passkey']['tuned']} of {summary['passkeys_asked']}", "met": all(by_length)},
    ]  # fmt: skip
    if parts.recipe.has_cache:
        rows.append({
            "name": "time of a decoded token, against dense", "wanted": "at most 1.00×", "got": f"{decoding:.2f}×",
            "met": decoding <= 1,
        })  # fmt: skip
    return rows + _cache_targets(parts, summary)


def _cache_targets(parts: ReportParts, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What was wanted of caches that hold less."""
    wanted, cut = parts.plan.settings.cache_budget, summary["after_the_cut"]
    if wanted is None:
        return []
    share = summary["kv_bytes"]["tuned"] / summary["kv_bytes"]["dense"]
    rows = [{
        "name": "bytes of keys and values, against dense", "wanted": f"at most {percent(wanted, 0)}",
        "got": percent(share, 1), "met": share <= wanted,
    }]  # fmt: skip
    if cut is not None:
        budget = parts.plan.settings.budget
        rows += [
            {"name": "perplexity after the cache was cut", "wanted": f"at most {percent(budget)} more",
             "got": signed(cut["perplexity_rise"]), "met": cut["perplexity_rise"] <= budget},
            {"name": "pass keys asked after the cache was cut",
             "wanted": f"no fewer than dense ({cut['passkey']['dense']})",
             "got": f"{cut['passkey']['tuned']} of {summary['passkeys_asked']}",
             "met": cut["passkey"]["tuned"] >= cut["passkey"]["dense"]},
        ]  # fmt: skip
    return rows


def heldout(parts: ReportParts, summary: dict[str, Any]) -> dict[str, Any]:
    """The table of measurements."""

    def row(name: str, values: dict[str, Any], show: Any) -> dict[str, str]:
        known = all(values[arm] is not None for arm in ARMS)
        ratio = f"{values['tuned'] / values['dense']:.3f}" if known and values["dense"] else "–"
        return {"name": name, "dense": show(values["dense"]), "tuned": show(values["tuned"]), "ratio": ratio}

    table = [
        row("prefill, median", summary["prefill_seconds"], seconds),
        row("one decoded token, median", summary["decode_seconds"], seconds),
        row("perplexity", summary["perplexity"], "{:.4f}".format),
        row("peak memory of a prefill", summary["peak_bytes"], megabytes),
        row("key/value cache", summary["kv_bytes"], megabytes),
    ]
    cut = summary["after_the_cut"]
    if cut is not None:
        table += [
            row(f"perplexity of the last {cut['tokens']} tokens, cache cut before", cut["perplexity"], "{:.4f}".format),
            row("pass keys asked after the cut", cut["passkey"], str),
        ]
    table.append({"name": "mean KL(dense ‖ tuned), nats", "dense": "–", "tuned": f"{summary['kl']:.5f}", "ratio": "–"})
    each = ", ".join(f"{ratio:.2f}×" for ratio in summary["prefill_speedup_each"])
    steps = len(parts.rounds[0]["dense"]["decode"])
    notes = (
        f"Prefill speed-up in each round: {each}. Then {steps} tokens are decoded in each round, dense from "
        f"{summary['cache']['dense']}, tuned from {summary['cache']['tuned']}."
    )
    if parts.without_cache:
        notes += f" No cache of Saccade's is in the recipe: {parts.without_cache}."
    if summary["peak_bytes"]["dense"] is None:
        notes += " Peak memory cannot be measured on this system."
    return {
        "rounds": len(parts.rounds), "table": table, "notes": notes, "depths": _depths(parts),
        "passkey": passkey_table(parts),
    }  # fmt: skip


def layers(parts: ReportParts) -> list[dict[str, Any]]:
    """What each layer runs."""
    rows = []
    by_key = {candidate.key: number for number, candidate in enumerate(parts.candidates)}
    for (name, scores), chosen in zip(parts.scores.items(), parts.assignment.chosen.tolist(), strict=True):
        choices = parts.recipe.layers[name].prefill
        cells = []
        for choice in choices:
            candidate = Candidate.of(choice)
            number = by_key[candidate.key]
            heads = [head for head, c in enumerate(chosen) if c == number]
            density = statistics.fmean(scores[number].density[head] for head in heads)
            cells.append({
                "heads": heads, "mechanism": candidate.mechanism, "label": parts.candidates[number].label,
                "density": density, "min_tokens": choice.min_tokens, "dtype": choice.dtype,
            })  # fmt: skip
        cache = parts.recipe.layers[name].cache
        words = None if cache is None else in_words(cache.build())
        rows.append({"key": name, "choices": cells, "dense_seconds": scores[0].seconds, "cache": words})
    return rows


def candidate_rows(parts: ReportParts) -> list[dict[str, Any]]:
    """Each candidate, summed or averaged over the layers, or from those that it was scored in."""
    rows = []
    for number, candidate in enumerate(parts.candidates):
        if number == 0:
            continue
        scores = [row[number] for row in parts.scores.values() if row[number].measured]
        share = len(parts.scores) / len(scores)
        rows.append({
            "mechanism": candidate.mechanism, "settings": candidate.settings, "label": candidate.label,
            "layers_scored": len(scores),
            "seconds": share * sum(score.seconds for score in scores),
            "select_seconds": share * sum(score.select_seconds for score in scores),
            "density": statistics.fmean(density for score in scores for density in score.density),
            "error": statistics.fmean(error for score in scores for error in score.errors),
            "damage": share * sum(sum(score.damage) for score in scores),
            "heads_using": int((parts.assignment.chosen == number).sum()),
        })  # fmt: skip
    return rows


def search(parts: ReportParts) -> dict[str, Any]:
    """Frontier and trials; `kept` is the mixture in the recipe."""
    return {
        "dense_seconds": float(parts.choices.seconds[..., 0].sum()),
        "frontier": [{"seconds": a.seconds, "damage": a.damage} for a in frontier(parts.choices)],
        "confirmed": [
            {"seconds": trial.seconds, "damage": trial.damage, "rise": trial.rise, "passkey": trial.passkey,
             "holds": trial.holds, "kept": trial is parts.kept}
            for trial in parts.trials
        ],
        "caches": parts.cache_trials,
    }  # fmt: skip
