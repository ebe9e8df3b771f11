"""The command line: `saccade list | show | verify | compare | tune | run | bench`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; bad input ends in one line and exit code 2."""
    try:
        from saccade.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit(f"saccade: the command line needs {error.name}: pip install 'saccade[cli]'")
    try:
        app(standalone_mode=True)
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"saccade: {error}\n")
        sys.exit(2)
