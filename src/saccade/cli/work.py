"""`saccade tune` and `run`: find a recipe, and use it."""

from __future__ import annotations

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
    keep_dtype: Annotated[
        bool, typer.Option("--keep-dtype", help="Compute all attention in the model's dtype, none in bfloat16.")
    ] = False,
    seed: int = 0,
) -> None:
    """Find what each layer can bear, prove it on held-out text, write a recipe and a report."""
    from saccade.tune import plan_tuning, tune

    loaded, tokenizer = load_model(model, device, dtype)
    plan = plan_tuning(
        loaded, context=context, budget=budget, quick=quick, seed=seed, mechanisms=mechanism,
        cache_budget=cache_budget, keep_dtype=keep_dtype,
    )  # fmt: skip
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
            mechanisms=mechanism, cache_budget=cache_budget, keep_dtype=keep_dtype,
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
