"""`saccade compare`: mechanisms side by side on the same queries, keys and values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from saccade.cli.work import load_model

if TYPE_CHECKING:
    from saccade.bench import Comparison, RoomComparison
    from saccade.bench.compare import Problem

console = Console()


def add_commands(app: typer.Typer) -> None:
    """Attach the command of this file."""
    app.command("compare")(compare_command)


def compare_command(
    mechanisms: Annotated[list[str] | None, typer.Argument(help="NAME, or NAME:setting=value,setting=value.")] = None,
    room: Annotated[str | None, typer.Option(help="Every selector of this room.")] = None,
    only: Annotated[
        str | None, typer.Option(help="With --room: rows whose name(settings) this regular expression is found in.")
    ] = None,
    shape: Annotated[str, typer.Option(help="batch,heads,kv-heads,tokens,dim")] = "1,8,8,4096,64",
    model: Annotated[str | None, typer.Option(help="Use a model's recorded q, k, v instead of a shape.")] = None,
    context: Annotated[int, typer.Option(help="Tokens recorded from the model.")] = 4096,
    layer: Annotated[int | None, typer.Option(help="Layer of the model; with --room some of all if not given.")] = None,
    noncausal: Annotated[bool, typer.Option("--noncausal")] = False,
    grid: Annotated[str | None, typer.Option(help="Sizes of the grid the tokens lie on, as in 16,32,32.")] = None,
    rounds: int = 5,
    crossover: Annotated[bool, typer.Option("--crossover/--no-crossover")] = True,
    device: str = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Write a plot of error against time to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="With --room: write the table to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compare mechanisms with dense attention on the same queries, keys and values."""
    from saccade.bench import compare, compare_room, parse_mechanism

    if bool(mechanisms) == (room is not None):
        raise ValueError(f"mechanisms={mechanisms}, room={room!r}: expected names of mechanisms, or --room")
    if (plot is not None and room is not None) or (room is None and (markdown, only) != (None, None)):
        raise ValueError("expected --plot with names of mechanisms, --markdown and --only with --room")
    for text in mechanisms or ():
        parse_mechanism(text)
    problems, words = make_problems(
        shape=shape, model=model, context=context, layer=layer, noncausal=noncausal, grid=grid, device=device,
        layers=5 if room is not None else 1,
    )  # fmt: skip
    if room is not None:
        found = compare_room(room, problems, rounds=rounds, problem=words, only=only, progress=_said)
        show_room(found, markdown, as_json=as_json)
        return
    one = problems[0]
    result = compare(
        mechanisms or (), one.q, one.k, one.v, geometry=one.geometry, scale=one.scale, rounds=rounds,
        crossover=crossover, problem=words,
    )  # fmt: skip
    if plot is not None:
        from saccade.bench.plot import plot_comparison

        plot_comparison(result, plot)
    show_comparison(result, as_json=as_json)


def make_problems(
    *, shape: str, model: str | None, context: int, layer: int | None, noncausal: bool, grid: str | None, device: str,
    layers: int,
) -> tuple[list[Problem], str]:  # fmt: skip
    """What the mechanisms are called on, and what that is in words.

    Args:
        shape: Five sizes, of random inputs.
        model: A model to record from instead.
        context: Tokens recorded.
        layer: The layer recorded; None for `layers` of them, evenly spread.
        noncausal: Whether every query sees every key.
        grid: Sizes of the grid that the tokens lie on, or None.
        device: Where.
        layers: How many layers.

    Returns:
        The problems, one per layer, and the words.

    Raises:
        ValueError: If something cannot be read.
    """
    from saccade.bench import Problem, random_problem
    from saccade.types import Geometry

    sizes = None if grid is None else parse_sizes("grid", grid, "one to three sizes as in 16,32,32")
    geometry = Geometry(causal=not noncausal, grid=sizes)
    if model is None:
        q, k, v = random_problem(parse_shape(shape), grid=sizes, device=device)
        where = "" if grid is None else f" on a grid of {grid}"
        return [Problem(q, k, v, geometry, None)], f"random q, k, v of shape {shape}{where}"
    from saccade.bench.record import record_layers, spread_layers

    loaded, tokenizer = load_model(model, device)
    chosen = spread_layers(loaded, layers) if layer is None else [layer]
    seen = record_layers(loaded, tokenizer, context, chosen)
    words = f"layer{'s' if len(chosen) > 1 else ''} {', '.join(map(str, chosen))} of {model}"
    problems = [Problem(one.q, one.k, one.v, geometry, one.scale) for one in seen]
    return problems, f"{words} on {context:,} tokens of built-in text"


def show_comparison(result: Comparison, *, as_json: bool) -> None:
    """Print a comparison."""
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
        return
    columns = ("mechanism", "error", "time", "choosing", "speed-up", "memory", "density", "faster from")
    table = Table(*columns, title=result.problem)
    for row in (result.dense, *result.rows):
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
        density = "" if row.density is None else f"{row.density:.1%}"
        table.add_row(
            row.label, f"{row.error:.4f}", f"{row.seconds * 1e3:.1f} ms", f"{row.select_seconds * 1e3:.1f} ms",
            f"{row.speedup:.2f}", memory, density, "" if row.crossover is None else f"{row.crossover:,}",
        )  # fmt: skip
    console.print(table)
    console.print(f"{result.machine.processor}, {result.machine.threads} threads", highlight=False)


def show_room(result: RoomComparison, markdown: Path | None, *, as_json: bool) -> None:
    """Print a room's comparison, and write its table."""
    from saccade.bench.room import COLUMNS, cells

    if markdown is not None:
        markdown.write_text(result.markdown() + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
        return
    table = Table(*COLUMNS, title=result.problem)
    for row in result.rows:
        table.add_row(*cells(row))
    Console(width=max(console.width, 160)).print(table)
    for name, reason in result.left_out.items():
        console.print(f"[dim]{name}: {reason}[/]", highlight=False)
    console.print(
        f"dense {result.dense_seconds * 1e3:.0f} ms; {result.machine.processor}, {result.machine.threads} threads",
        highlight=False,
    )


def parse_shape(text: str) -> tuple[int, ...]:
    """Five whole numbers; `ValueError` if they are not."""
    return parse_sizes("shape", text, "batch,heads,kv-heads,tokens,dim as in 1,8,8,4096,64")


def parse_sizes(name: str, text: str, expected: str) -> tuple[int, ...]:
    """Whole numbers.

    Args:
        name: Of the option.
        text: They, with commas between.
        expected: What should stand there, in words.

    Returns:
        The numbers.

    Raises:
        ValueError: If they are not.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name}={text!r}: expected {expected}") from None


def _said(note: str) -> None:
    """A long comparison shows where it is."""
    Console(stderr=True).print(f"[dim]{note}[/]", highlight=False)
