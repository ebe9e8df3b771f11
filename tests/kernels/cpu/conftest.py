"""What the tests of the C++ engine share: running on one instruction set, with so many threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from saccade.kernels import cpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `isa` runs for each instruction set."""
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", cpu.INSTRUCTION_SETS)


@contextmanager
def _engine(isa: str | None = None, threads: int | None = None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if isa is not None and cpu.use(isa) is None:
            pytest.skip(f"this machine or build has no {isa}")
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        if isa is not None:
            cpu.use(None)
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def engine() -> Callable:
    """`with engine(isa, threads)`: inside, that instruction set and so many threads; None leaves either as it is."""
    return _engine
