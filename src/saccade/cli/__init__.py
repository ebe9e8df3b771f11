"""The command line: `saccade list | show | verify | compare | tune | run | bench`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; bad input ends in one line and exit code 2."""
    try:
        from saccade.cli.app import app
    except ImportError as error:
        sys.exit(f"saccade: the command line needs more packages ({error}): pip install 'saccade[cli]'")
    try:
        app(standalone_mode=True)
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"saccade: {error}\n")
        sys.exit(2)
