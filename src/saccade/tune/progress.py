"""How the tuner tells what it is doing; the command line draws it, a library call may be silent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Silent. A subclass shows stages with a bar and the time left."""

    @contextmanager
    def stage(self, title: str, steps: int) -> Iterator[Progress]:
        """A stage of `steps` steps."""
        self.begin(title, steps)
        try:
            yield self
        finally:
            self.end()

    def begin(self, title: str, steps: int) -> None:
        """A stage starts."""

    def step(self, note: str = "") -> None:
        """One step of the stage is done."""

    def end(self) -> None:
        """The stage is over."""

    def say(self, text: str) -> None:
        """A line for the user."""
