"""Without memory for its scratch each kernel says so, by a MemoryError, and goes on working."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}"),
    pytest.mark.skipif("SACCADE_SANITIZED" in os.environ, reason="the sanitizer's own memory fits under no limit"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs a system that limits address space"),
]

ROOM = 2**28
"""Bytes beyond what is held already: for the results, not for the scratch of rows this long."""


@contextmanager
def little_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def rows(dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """One query, one key, and its value of 16 channels."""
    return torch.zeros(1, 1, 1, dim), torch.zeros(1, 1, 1, dim), torch.full((1, 1, 1, 16), 3.0)


def gather(dim: int) -> Callable[[], Tensor]:
    q, k, v = rows(dim)
    return lambda: cpu.gathering(q, k, v, torch.zeros(1, 1, 1, 1, dtype=torch.int64), scale=1.0)[0]


def decode(dim: int) -> Callable[[], Tensor]:
    q, k, v = rows(dim)
    return lambda: cpu.decoding(q, k, v, scale=1.0)[0]


def boxes(across: str) -> Callable[[int], Callable[[], Tensor]]:
    def call(dim: int) -> Callable[[], Tensor]:
        q, k, v = rows(dim)
        end = torch.zeros(1, dtype=torch.int32)
        return lambda: cpu.boxes_attention(q, k, v, end, end, [1], [1], 1.0, across)[0]

    return call


def box_gradients(across: str) -> Callable[[int], Callable[[], Tensor]]:
    def call(dim: int) -> Callable[[], Tensor]:
        q, k, v = rows(dim)
        end, lse = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, 1)
        given = (v, lse, q, k, v, v, lse, end, end, [1], [1], 1.0, across)
        return lambda: cpu.boxes_gradients(*given)[2]

    return call


def scan(dim: int) -> Callable[[], Tensor]:
    q, k, v = torch.zeros(1, 1, 1, 2, dim), torch.zeros(1, 1, 2, dim), torch.zeros(1, 1, 2, 16)
    state = torch.zeros(1, 1, dim, 16)
    return lambda: cpu.scan(q, k, v, None, state, 1.0)[0] + 3


CALLS = {  # what, and a dim for which the scratch takes more than ROOM on every instruction set
    "gather": (gather, 2**25),
    "decode": (decode, 2**22),
    "boxes by tiles": (boxes("tiles"), 2**23),
    "boxes by rows": (boxes("rows"), 2**23),
    "gradients by tiles": (box_gradients("tiles"), 2**23),
    "gradients by rows": (box_gradients("rows"), 2**23),
    "scan": (scan, 2**21),
}


@pytest.mark.parametrize("kind", CALLS)
def test_no_memory_for_scratch_is_a_memory_error(kind: str, isa: str) -> None:
    make, dim = CALLS[kind]
    small, large, threads = make(16), make(dim), torch.get_num_threads()
    if cpu.use(isa) is None:
        pytest.skip(f"this machine or build has no {isa}")
    try:
        torch.set_num_threads(1)
        before = small()
        with little_memory(), pytest.raises(MemoryError, match="impl='cpu': no memory for the threads' scratch"):
            large()
        assert torch.equal(small(), before)
        assert bool((before == 3).all())
    finally:
        cpu.use(None)
        torch.set_num_threads(threads)
