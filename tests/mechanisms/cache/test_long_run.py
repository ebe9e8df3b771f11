"""Long runs: at a fixed budget memory stays flat."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import pytest
import torch

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import CachePolicy, compose
from saccade.mechanisms.cache.h2o import H2O
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.cache.storage import Storage

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")


def resident() -> int:
    """Bytes of anonymous memory that the process holds, what torch has freed not counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024


def run(policy: CachePolicy, steps: int) -> tuple[set[int], list[int]]:
    """Bytes the cache says it held at rest, and resident bytes at quarters of the run, after a warm-up."""
    generator = torch.Generator().manual_seed(0)
    layer = CachedAttention(policy)
    draw = lambda heads, tokens: torch.randn(1, heads, tokens, 32, generator=generator)
    layer(draw(4, 1000), draw(2, 1000), draw(2, 1000))
    held, memory = set(), []
    for step in range(steps):
        layer(draw(4, 1), draw(2, 1), draw(2, 1))
        held.add(layer.nbytes)
        if step % (steps // 4) == steps // 8:
            memory.append(resident())
    assert layer.kept.seen.tolist() == [1000 + steps]
    return held, memory


@linux
@pytest.mark.parametrize(
    "policy",
    [
        SinkRecent(sinks=4, recent=508),
        compose(keep=H2O(heavy=128, recent=128), store=Storage(bits=4)),
    ],
    ids=["sink_recent", "h2o_4_bits"],
)
@pytest.mark.parametrize("steps", [2000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_memory_stays_flat(policy: CachePolicy, steps: int) -> None:
    held, memory = run(policy, steps)
    assert len(held) == 1
    assert max(memory) - min(memory) < 0.01 * min(memory), memory
