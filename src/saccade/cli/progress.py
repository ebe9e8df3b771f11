"""The tuner's progress on a terminal: a bar per stage, and the time left in all."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from saccade.tune import Plan, Progress


class BarProgress(Progress):
    """Bars of rich; on something that is no terminal, a line per stage.

    Args:
        console: Where to draw.
        plan: Estimates that the time left is scaled from.
    """

    def __init__(self, console: Console, plan: Plan) -> None:
        self.console = console
        self.plan = plan
        self.bars = Bars(
            TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}[/]"), console=console,
        )  # fmt: skip
        self.stage_name = ""
        self.stage_started = time.time()
        self.done_estimate = 0.0
        self.done_seconds = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def begin(self, title: str, steps: int) -> None:
        """A stage starts."""
        self.stage_name, self.stage_started = title, time.time()
        if self.console.is_terminal:
            self.task = self.bars.add_task(title, total=steps, note=self.time_left())
        else:
            self.console.print(f"{title}: {self.time_left()}", highlight=False)

    def step(self, note: str = "") -> None:
        """One step of the stage is done."""
        if self.console.is_terminal:
            self.bars.update(self.task, advance=1, note=note)
        elif note:
            self.console.print(f"  {note}", highlight=False)

    def end(self) -> None:
        """The stage is over; how long it took says how fast this machine is."""
        self.done_estimate += 60 * self.plan.minutes.get(self.stage_name, 0.0)
        self.done_seconds += time.time() - self.stage_started

    def say(self, text: str) -> None:
        """A line for the user."""
        self.console.print(text, highlight=False)

    def time_left(self) -> str:
        """What the plan has left, at the pace seen so far."""
        left = 60 * self.plan.total_minutes - self.done_estimate
        pace = self.done_seconds / self.done_estimate if self.done_estimate > 0 else 1.0
        return f"about {max(left * pace, 0.0) / 60:.0f} min left in all"
