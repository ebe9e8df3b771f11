"""The commands, gathered."""

from __future__ import annotations

import typer

from saccade.cli import benching, catalogue, comparing, work

app = typer.Typer(
    name="saccade",
    help="Every efficient-attention mechanism on the same few engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
catalogue.add_commands(app)
work.add_commands(app)
benching.add_commands(app)
comparing.add_commands(app)
