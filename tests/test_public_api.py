"""What `import saccade` offers, and what it must not do."""

from __future__ import annotations

import subprocess
import sys

import pytest

import saccade

LATER = {"PagedCache", "Recipe", "apply", "compare", "explain", "tune", "verify"}


def test_every_public_name_is_there():
    for name in saccade.__all__:
        assert getattr(saccade, name) is not None
    assert set(saccade.__all__) >= LATER
    assert saccade.__all__ == sorted(saccade.__all__, key=lambda name: (name[0].islower(), name))
    assert len(saccade.__all__) <= 30


def test_an_unknown_name_says_so():
    with pytest.raises(AttributeError, match="module 'saccade' has no attribute 'atend'"):
        _ = saccade.atend


@pytest.mark.quick
def test_importing_loads_neither_transformers_nor_plots():
    code = "import saccade, sys; sys.exit(any(m in sys.modules for m in ('transformers', 'matplotlib', 'typer')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
