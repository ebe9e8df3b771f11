"""`saccade tune`, `run` and `bench`: find a recipe, use it, and measure."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from saccade.cli.progress import BarProgress

console = Console()
BUILT_IN = "smollm2"


def add_commands(app: typer.Typer) -> None:
    """Attach the commands of this file."""
    app.command("tune")(tune_command)
    app.command("run")(run_command)
    app.command("bench")(bench_command)


def load_model(name: str, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """A model and its tokenizer: the built-in one, a folder, or a transformers id (never with code of its own).

    Args:
        name: `smollm2`, a folder, or a transformers id.
        device: In torch's words.
        dtype: Of the weights: float32, bfloat16 or float16.

    Returns:
        The model in eval mode on its device, and its tokenizer.

    Raises:
        ValueError: If the device or dtype is unknown, or the model cannot be loaded.
    """
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(kinds)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r}: not available here: {str(error).splitlines()[0]}") from error
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name == BUILT_IN:
        from saccade.models.smollm2 import is_cached, load_smollm2

        if not is_cached():
            console.print("fetching SmolLM2-135M-Instruct (93 MB, once)")
        model, tokenizer = load_smollm2(dtype=kinds[dtype])
    else:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=kinds[dtype])
        except (OSError, ValueError) as error:
            raise ValueError(f"model={name!r}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(device).eval(), tokenizer


def tune_command(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, or a transformers id.")] = BUILT_IN,
    out: Annotated[Path, typer.Option(help="Folder for recipe, report and state.")] = Path("saccade-out/tune"),
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to tune and measure on.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 8192,
    budget: Annotated[float, typer.Option(help="Largest allowed relative rise in perplexity.")] = 0.01,
    device: str = "cpu",
    dtype: str = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer candidates, rounds and pass keys.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be tried, and stop.")] = False,
    mechanism: Annotated[list[str] | None, typer.Option(help="Only these mechanisms.")] = None,
    cache_budget: Annotated[
        float | None,
        typer.Option(help="Part of the dense cache's bytes to aim for, such as 0.5; none keeps everything."),
    ] = None,
    seed: int = 0,
) -> None:
    """Find what each layer can bear, prove it on held-out text, write a recipe and a report."""
    from saccade.tune import plan_tuning, tune

    loaded, tokenizer = load_model(model, device, dtype)
    plan = plan_tuning(
        loaded, context=context, budget=budget, quick=quick, seed=seed, mechanisms=mechanism, cache_budget=cache_budget
    )
    console.print(
        f"{len(plan.candidates)} candidates of {len({c.mechanism for c in plan.candidates})} mechanisms per layer, "
        f"{context:,} tokens, at most {budget:.2%} more perplexity; about {plan.total_minutes:.0f} minutes"
    )
    if dry_run:
        table = Table("stage", "minutes")
        for stage, minutes in plan.minutes.items():
            table.add_row(stage, f"{minutes:.1f}")
        console.print(table)
        for candidate in plan.candidates:
            console.print(f"  {candidate.label}", highlight=False)
        for cache in plan.caches:
            console.print(f"  cache: {cache.label}", highlight=False)
        for name, why in plan.left_out.items():
            console.print(f"  [dim]{name}: {why}[/]", highlight=False)
        return
    started = time.time()
    with BarProgress(console, plan) as progress:
        result = tune(
            loaded, tokenizer, out, text=text, context=context, budget=budget, quick=quick, seed=seed,
            mechanisms=mechanism, cache_budget=cache_budget,
            name="SmolLM2-135M-Instruct" if model == BUILT_IN else model,
            command=shlex.join(["saccade", *sys.argv[1:]]), progress=progress,
        )  # fmt: skip
    print_summary(result.report)
    console.print(f"{(time.time() - started) / 60:.1f} minutes", highlight=False)
    console.print(f"recipe  {result.folder / 'recipe.json'}\nreport  {result.folder / 'report.html'}", highlight=False)


def print_summary(report: dict[str, Any]) -> None:
    """The held-out table and the targets."""
    table = Table("", "dense", "tuned", "tuned / dense")
    for row in report["heldout"]["table"]:
        table.add_row(row["name"], row["dense"], row["tuned"], row["ratio"])
    for row in report["heldout"]["passkey"]:
        asked = sum(cell["tries"] for cell in row["cells"])
        found = [f"{sum(cell[arm] for cell in row['cells'])}/{asked}" for arm in ("dense", "tuned")]
        table.add_row(f"pass keys at {row['tokens']:,} tokens", *found, "")
    console.print(table)
    for target in report["targets"]:
        mark = "[green]reached[/]" if target["met"] else "[red]missed[/]"
        console.print(f"{mark}  {target['name']}: {target['got']} (wanted {target['wanted']})", highlight=False)


def run_command(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, or a transformers id.")] = BUILT_IN,
    prompt: Annotated[str | None, typer.Option(help="What to say; - reads standard input.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="recipe.json of `saccade tune`; none runs dense.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 128,
    device: str = "cpu",
    dtype: str = "float32",
    explain: Annotated[bool, typer.Option("--explain", help="Show afterwards what each layer ran.")] = False,
) -> None:
    """Generate text with a recipe, streaming, and say how fast it was."""
    from saccade.cli.generate import generate
    from saccade.plug import Recipe

    if tokens < 1:
        raise ValueError(f"tokens={tokens}: expected at least 1")
    text = sys.stdin.read() if prompt == "-" else prompt
    if text is None or not text.strip():
        raise ValueError(f"prompt={text!r}: expected some text, or - for standard input")
    wanted = None if recipe is None else Recipe.load(recipe)
    loaded, tokenizer = load_model(model, device, dtype)
    generate(loaded, tokenizer, text, wanted, tokens, explain_after=explain)


def bench_command(
    what: Annotated[
        str,
        typer.Argument(
            help="ops: engines against PyTorch; cache: cache policies in a model; decode: caches in a layer of an 8B "
            "model; training: trainable selectors against random blocks; machine: this one."
        ),
    ] = "ops",
    as_json: Annotated[bool, typer.Option("--json")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes only: a smoke run, not a measurement.")] = False,
    only: Annotated[str | None, typer.Option(help="Cases whose name this regular expression is found in.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds of each case; the median counts.")] = 7,
    model: Annotated[str, typer.Option(help="cache: smollm2, a folder, or a transformers id.")] = BUILT_IN,
    context: Annotated[int, typer.Option(help="cache: tokens of a prompt. SmolLM2 takes up to 8,192.")] = 2048,
    dtype: Annotated[str, typer.Option(help="cache: float32, bfloat16 or float16.")] = "bfloat16",
    windows: Annotated[int, typer.Option(help="cache: stretches of text.")] = 4,
    tries: Annotated[int, typer.Option(help="cache: recall tasks of each kind.")] = 3,
    part: Annotated[
        list[str] | None, typer.Option(help="cache: text, agnostic, aware or speed; several times, all if not at all.")
    ] = None,
    notes: Annotated[Path | None, typer.Option(help="cache: where a run that is cut off goes on from.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="decode: lengths of the cache.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="cache, decode: parts kept or read, each a row.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="cache: draw quality against bytes, as SVG or PNG.")] = None,
) -> None:
    """Measure: engines, caches, what a learned choice is worth, or the machine."""
    from saccade.bench.measure import describe_machine

    if what not in ("ops", "cache", "decode", "training", "machine"):
        raise ValueError(f"what={what!r}: expected ops, cache, decode, training or machine")
    machine = describe_machine().to_json()
    if what == "cache":
        loaded, tokenizer = load_model(model, dtype=dtype)
        columns, outcomes = _caches(
            loaded, tokenizer, context, quick, windows=windows, tries=tries, rounds=rounds, only=only, parts=part,
            notes=notes, budgets=budget,
        )  # fmt: skip
        if plot is not None:
            from saccade.bench.plot import plot_caches

            plot_caches(outcomes[0], plot)
    else:
        columns, outcomes = _measured(what, quick, only, rounds, tokens, budget)
    rows = [row for outcome in outcomes for row in outcome.rows()]
    if markdown is not None:
        lines = [columns, ("---",) * len(columns), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        markdown.write_text(text, encoding="utf-8")
    if as_json:
        print(json.dumps({"machine": machine, "cases": [outcome.to_json() for outcome in outcomes]}, indent=2))
        return
    if outcomes:
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        Console(width=max(console.width, 160)).print(table)
    for name, reason in (pair for outcome in outcomes for pair in getattr(outcome, "left_out", {}).items()):
        console.print(f"[dim]{name}: {reason}[/]", highlight=False)
    for key, value in machine.items():
        console.print(f"[dim]{key:>16}[/]  {value}", highlight=False)


def _measured(
    what: str, quick: bool, only: str | None, rounds: int, tokens: list[int] | None, budgets: list[float] | None
) -> tuple[tuple[str, ...], list[Any]]:
    """Columns and outcomes of one kind of measurement."""
    from saccade.bench import cache_speed, ops, training

    if what == "ops":
        return ops.COLUMNS, [*ops.bench_ops(quick=quick, only=only, rounds=rounds, progress=_said)]
    if what == "training":
        return training.COLUMNS, [*training.bench_training(60 if quick else 400, only, progress=_said)]
    if what == "decode":
        lengths = tokens or ((1024,) if quick else cache_speed.LENGTHS)
        rows = cache_speed.bench_decode(lengths, rounds=rounds, budgets=budgets or (0.25,), only=only, progress=_noted)
        return cache_speed.COLUMNS, [*rows]
    return (), []


def _caches(
    model: Any, tokenizer: Any, context: int, quick: bool, *, parts: list[str] | None,
    budgets: list[float] | None, **options: Any,
) -> tuple[tuple[str, ...], list[Any]]:  # fmt: skip
    """Columns and outcome for cache policies in a model."""
    from saccade.bench import cache

    options |= {"parts": parts or cache.PARTS, "budgets": budgets or cache.BUDGETS, "progress": _noted}
    if quick:
        context = min(context, 512)
        options |= {"steps": 8, "windows": 1, "tries": 1, "rounds": 1, "budgets": (0.25,)}
    result = cache.bench_cache(model, tokenizer, context, **options)
    return cache.COLUMNS, [result]


def _noted(note: str) -> None:
    """A long run shows where it is."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{note}\n")


def _said(outcome: Any) -> None:
    """A long run shows where it is."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{outcome.name}\n")
