"""`saccade list`, `show` and `verify`: what there is, and whether it keeps its laws."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saccade.catalog import Card, Paper, cards, get, papers, search
from saccade.laws import LAWS, Verdict, verify
from saccade.types import BlockLayout, Geometry, Kind

console = Console()
MARKS = {"passed": "[green]passed[/]", "failed": "[red]failed[/]", "skipped": "[dim]skipped[/]"}


def add_commands(app: typer.Typer) -> None:
    """Attach the commands of this file."""
    app.command("list")(list_command)
    app.command("show")(show_command)
    app.command("verify")(verify_command)


def paper_status(paper: Paper) -> tuple[str, str]:
    """What Saccade makes of a paper: ("implemented", by which names), ("not yet", ...) or ("nothing to build", why)."""
    names = [card.name for card in cards() if paper.title in card.papers]
    if names:
        return "implemented", ", ".join(names)
    if paper.scope == "context":
        return "nothing to build", paper.unit or paper.what or "no mechanism of its own"
    return "not yet", paper.missing or f"would live in {paper.room}/"


def list_command(
    room: Annotated[str | None, typer.Option(help="Only this room, such as where or cache.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Only mechanisms for this attention pattern.")] = None,
    training_free: Annotated[bool | None, typer.Option("--training-free/--trained")] = None,
    capability: Annotated[str | None, typer.Option(help="Only mechanisms that support this.")] = None,
    title: Annotated[str | None, typer.Option(help="Part of a paper's title.")] = None,
    all_papers: Annotated[bool, typer.Option("--papers", help="Every paper of the catalogue and its state.")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """List the registered mechanisms, or with --papers what became of every paper."""
    found = search(room, pattern, training_free, capability, title)
    chosen = [
        p for p in papers() if (room is None or p.room == room) and (title is None or title.lower() in p.title.lower())
    ]
    if as_json:
        statuses = [
            {
                "title": paper.title,
                "room": paper.room,
                "status": status,
                "detail": detail,
                "missing": paper.missing,
            }
            for paper in chosen
            for status, detail in [paper_status(paper)]
        ]
        print(json.dumps({"mechanisms": [card_json(card) for card in found], "papers": statuses}, indent=2))
        return
    if all_papers:
        table = Table("paper", "room", "state", "", "missing")
        for paper in chosen:
            table.add_row(*map(escape, (paper.title, paper.room, *paper_status(paper), paper.missing)))
    else:
        table = Table("name", "room", "what", "drop-in")
        for card in found:
            table.add_row(card.name, card.room, escape(card.summary), "yes" if card.training_free else "")
    console.print(table)
    done = sum(paper_status(paper)[0] == "implemented" for paper in papers())
    console.print(f"{len(found)} mechanisms; {done} of {len(papers())} papers implemented")


def card_json(card: Card) -> dict[str, Any]:
    """The card as plain data."""
    return {
        "name": card.name, "room": card.room, "kind": card.kind, "summary": card.summary, "papers": list(card.papers),
        "other_papers": list(card.other_papers), "year": card.year, "code": card.code,
        "patterns": sorted(card.patterns), "supports": sorted(card.supports), "training_free": card.training_free,
        "exact_when": card.exact_when, "complexity": card.complexity, "deviations": list(card.deviations),
        "prefill_only": card.prefill_only, "example": dict(card.example),
    }  # fmt: skip


def show_command(
    name: str,
    tokens: Annotated[int, typer.Option(help="Length of the drawn example.")] = 512,
    run_laws: Annotated[bool, typer.Option("--laws/--no-laws", help="Run its laws now.")] = True,
    picture: Annotated[str | None, typer.Option(help="Also write the pattern's picture to this file.")] = None,
) -> None:
    """Show a card: paper, settings, picture of its pattern, laws."""
    card = get(name)
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: expected at least 1")
    if picture is not None and card.kind is not Kind.SELECTOR:
        raise ValueError(f"picture={picture!r}: {card.name} has no pattern to draw, expected a {Kind.SELECTOR}")
    console.print(f"[bold]{card.name}[/]  ({card.room}, {card.kind})\n{escape(card.summary)}\n")
    for title in card.papers:
        console.print(f"  {escape(title)} ({card.year})")
    for title in card.other_papers:
        console.print(f"  {escape(title)} (not in the catalogue)")
    rows = {
        "authors' code": card.code or "none", "patterns": ", ".join(sorted(card.patterns)) or "does not apply",
        "supports": ", ".join(sorted(card.supports)) or "nothing beyond the plain call",
        "training-free": "yes" if card.training_free else "no", "exact when": card.exact_when or "never",
        "work grows as": card.complexity or "not stated", "example settings": json.dumps(dict(card.example)),
    }  # fmt: skip
    for label, text in rows.items():
        console.print(f"[dim]{label:>17}[/]  {escape(text)}", highlight=False)
    if card.prefill_only:
        console.print(f"[dim]{'prefill only':>17}[/]  {escape(card.prefill_only)}", highlight=False)
    for line in card.deviations:
        console.print(f"[dim]{'deviation':>17}[/]  {escape(line)}", highlight=False)
    layout = _example_layout(card, tokens)
    if layout is not None:
        console.print(f"\n[dim]rows are queries, columns keys; {tokens} tokens[/]\n{draw(layout)}", highlight=False)
        if picture is not None:
            layout.plot(path=picture)
    if run_laws:
        console.print(verdict_table(verify(name)))


def _example_layout(card: Card, tokens: int) -> BlockLayout | None:
    """The example's choice on a seeded problem, as blocks; None for other kinds."""
    if card.kind is not Kind.SELECTOR:
        return None
    from saccade.laws.subjects import Subject

    subject = Subject(card)
    problem = subject.problem(queries=tokens, batch=1)
    chosen = subject.mechanism.pattern(problem.q, problem.k, Geometry(causal=subject.causal))
    return chosen if isinstance(chosen, BlockLayout) else BlockLayout.from_dense(chosen.to_dense(), 16)


def draw(layout: BlockLayout, size: int = 32) -> str:
    """The first head's pattern in characters, darker = denser."""
    from saccade.types.layout_plot import coverage

    shades = " ░▒▓█"
    cells = coverage(layout, 0, 0, size)
    return "\n".join("".join(shades[min(4, int(float(x) * 4 + 0.999))] * 2 for x in row) for row in cells)


def verify_command(
    names: Annotated[list[str] | None, typer.Argument(help="Mechanisms; none with --all.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every registered mechanism.")] = False,
    room: Annotated[str | None, typer.Option(help="Every mechanism of this room, such as where or cache.")] = None,
    law: Annotated[list[int] | None, typer.Option(help="Only these laws.")] = None,
    device: str = "cpu",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Run the laws on mechanisms; exit code 1 if one fails."""
    if every + bool(names) + (room is not None) != 1:
        raise ValueError(f"names={names or []}: expected names, or --all without names, or --room without both")
    wanted = [get(name).name for name in names or []] or [card.name for card in search(room)]
    results: dict[str, list[Verdict]] = {}
    for name in wanted:
        results[name] = verify(name, device, law)
        if not as_json:
            console.print(f"[bold]{name}[/]")
            console.print(verdict_table(results[name]))
    counts = {state: sum(v.status == state for vs in results.values() for v in vs) for state in MARKS}
    if as_json:
        mechanisms = {name: [asdict(verdict) for verdict in verdicts] for name, verdicts in results.items()}
        print(json.dumps({"laws": len(LAWS), "counts": counts, "mechanisms": mechanisms}, indent=2))
    else:
        console.print(", ".join(f"{count} {state}" for state, count in counts.items()))
    if counts["failed"]:
        raise typer.Exit(1)


def verdict_table(verdicts: list[Verdict]) -> Table:
    """Verdicts as a table."""
    table = Table("law", "", "", show_edge=False)
    for verdict in verdicts:
        table.add_row(f"{verdict.law:>2} {verdict.title}", MARKS[verdict.status], escape(verdict.detail))
    return table
