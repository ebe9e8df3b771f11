"""What the tests of the C++ engine share."""

from __future__ import annotations

import pytest

from saccade.kernels import cpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `isa` runs for each instruction set."""
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", cpu.INSTRUCTION_SETS)
