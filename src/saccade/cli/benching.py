"""`saccade bench`: measure, and print what was measured as soon as it is there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.table import Table

from saccade.cli.work import BUILT_IN, load_model

WIDEST, SPARE = 40, 2
"""Characters of a column at most, and beyond the longest of the first cases; what is longer takes several lines."""


def add_commands(app: typer.Typer) -> None:
    """Attach the command of this file."""
    app.command("bench")(bench_command)


class Printed:
    """What is measured, printed case by case, so that a run that is cut off has shown what it had.

    A table's columns are as wide as its first cases take. JSON is one document, `{"machine": {..}, "cases": [..]}`,
    with a line for each case; where the process was killed, `]}` makes it whole.

    Args:
        columns: Names of the table's.
        machine: What `describe_machine` found.
        as_json: Whether JSON is printed, not a table.
        markdown: File that takes the table too.
    """

    def __init__(
        self, columns: tuple[str, ...], machine: dict[str, Any], *, as_json: bool, markdown: Path | None
    ) -> None:
        self.columns, self.machine, self.as_json, self.markdown = columns, machine, as_json, markdown
        self.console = Console()
        self.widths: list[int] = []
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def add(self, *outcomes: Any) -> None:
        """Prints them; each has `rows()` and `to_json()`."""
        if self.count == 0:
            self._begin()
        rows = [row for outcome in outcomes for row in outcome.rows()]
        if self.as_json:
            for number, outcome in enumerate(outcomes, self.count):
                self._write(",\n" * (number > 0) + json.dumps(outcome.to_json()))
        else:
            self._show(rows)
        self._note(rows)
        self.count += len(outcomes)

    def _begin(self) -> None:
        if self.as_json:
            self._write(f'{{"machine": {json.dumps(self.machine)}, "cases": [\n')
        if self.markdown is not None:
            self.markdown.write_text("", encoding="utf-8")
        self._note([self.columns, ("---",) * len(self.columns)])

    def _note(self, rows: Iterable[tuple[str, ...]]) -> None:
        if self.markdown is not None:
            with self.markdown.open("a", encoding="utf-8") as file:
                file.writelines("| " + " | ".join(row) + " |\n" for row in rows)

    def _show(self, rows: list[tuple[str, ...]]) -> None:
        """One more piece of the table, as wide as those before."""
        if not rows:
            return
        first = not self.widths
        if first:
            self.widths = [min(WIDEST, SPARE + max(map(len, cells))) for cells in zip(self.columns, *rows, strict=True)]
        table = Table(show_header=first, box=None, padding=(0, 1, 0, 0))
        for name, width in zip(self.columns, self.widths, strict=True):
            table.add_column(name, width=width, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console(width=max(self.console.width, sum(self.widths) + len(self.widths))).print(table)
        sys.stdout.flush()

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        """Ends what was begun, also where a case raised or the run was interrupted."""
        if self.count == 0 and kind is None:
            self._begin()
        if self.as_json and (self.count or kind is None):
            self._write("\n]}\n")
        if not self.as_json and kind is None:
            for key, value in self.machine.items():
                self.console.print(f"[dim]{key:>16}[/]  {value}", highlight=False)


def bench_command(
    what: Annotated[
        str,
        typer.Argument(
            help="ops: engines against PyTorch; cache: cache policies in a model; decode: caches in a layer of an 8B "
            "model; training: trained choices against random ones; machine: this one."
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
    disk: Annotated[
        Path | None, typer.Option(help="decode: a directory, for rows of caches with half their pages on its disk.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="cache: draw quality against bytes, as SVG or PNG.")] = None,
) -> None:
    """Measure: engines, caches, what a learned choice is worth, or the machine; print case by case."""
    from saccade.bench import cache, cache_speed, ops, training
    from saccade.bench.measure import describe_machine

    columns = {
        "ops": ops.COLUMNS, "cache": cache.COLUMNS, "decode": cache_speed.COLUMNS, "training": training.COLUMNS,
        "machine": (),
    }  # fmt: skip
    if what not in columns:
        *most, last = columns
        raise ValueError(f"what={what!r}: expected {', '.join(most)} or {last}")
    machine = describe_machine().to_json()
    with Printed(columns[what], machine, as_json=as_json, markdown=markdown) as printed:
        if what == "ops":
            ops.bench_ops(quick=quick, only=only, rounds=rounds, starting=_noted, progress=printed.add)
        elif what == "training":
            training.bench_training(60 if quick else 400, only, 1 if quick else 2, progress=printed.add)
        elif what == "decode":
            lengths = tokens or ((1024,) if quick else cache_speed.LENGTHS)
            printed.add(*cache_speed.bench_decode(
                lengths, rounds=rounds, budgets=budget or (0.25,), only=only, disk=disk, progress=_noted
            ))  # fmt: skip
        elif what == "cache":
            loaded, tokenizer = load_model(model, dtype=dtype)
            result = _caches(
                loaded, tokenizer, context, quick, windows=windows, tries=tries, rounds=rounds, only=only, parts=part,
                notes=notes, budgets=budget,
            )  # fmt: skip
            if plot is not None:
                from saccade.bench.plot import plot_caches

                plot_caches(result, plot)
            printed.add(result)
            if not as_json:
                for name, reason in result.left_out.items():
                    printed.console.print(f"[dim]{name}: {reason}[/]", highlight=False)


def _caches(
    model: Any, tokenizer: Any, context: int, quick: bool, *, parts: list[str] | None,
    budgets: list[float] | None, **options: Any,
) -> Any:  # fmt: skip
    """Cache policies in a model."""
    from saccade.bench import cache

    options |= {"parts": parts or cache.PARTS, "budgets": budgets or cache.BUDGETS, "progress": _noted}
    if quick:
        context = min(context, 512)
        options |= {"steps": 8, "windows": 1, "tries": 1, "rounds": 1, "budgets": (0.25,)}
    return cache.bench_cache(model, tokenizer, context, **options)


def _noted(note: str) -> None:
    """A long run shows where it is, also where its output goes to a file."""
    sys.stderr.write(f"{note}\n")
    sys.stderr.flush()
