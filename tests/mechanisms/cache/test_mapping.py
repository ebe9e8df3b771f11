"""Large pages of a mapping: there where everything is written, gone at once with any part of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from saccade.mechanisms.cache import mapping as module
from saccade.mechanisms.cache.arena import Arena
from saccade.mechanisms.cache.mapping import Mapping, large_page

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = large_page() if sys.platform == "linux" else 0
large = pytest.mark.skipif(
    not LARGE or "[never]" in ENABLED.read_text(encoding="ascii"), reason="this system has no large pages to ask for"
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="mappings are for Linux hosts")


def held(mapping: Mapping, what: str) -> int:
    """Bytes of a kind that the system counts in the part of the address space where the mapping lies."""
    start, total, inside = mapping.bytes.data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            low, high = (int(x, 16) for x in name.split("-"))
            inside = low < start + len(mapping.bytes) and start < high
        elif inside and name == f"{what}:":
            total += int(rest[0]) * 1024
    return total


@large
def test_large_pages_lie_within_what_is_expected_and_go_with_any_part_of_it() -> None:
    mapping = Mapping(16 * LARGE)
    mapping.expect(3000, 10 * LARGE)
    mapping.bytes[3000 : 10 * LARGE] = 1
    assert held(mapping, "AnonHugePages") >= 8 * LARGE
    assert held(mapping, "Rss") <= 10 * LARGE
    mapping.release(4 * LARGE, 6 * LARGE + 8192)
    assert held(mapping, "AnonHugePages") <= 8 * LARGE
    assert held(mapping, "Rss") == pytest.approx(8 * LARGE - 8192, abs=2 * 4096)
    assert bool((mapping.bytes[3000 : 4 * LARGE] == 1).all())
    assert not bool(mapping.bytes[4 * LARGE : 6 * LARGE].any())
    assert bool((mapping.bytes[6 * LARGE + 8192 : 10 * LARGE] == 1).all())


@large
def test_a_byte_written_where_a_large_page_was_given_back_takes_a_small_one() -> None:
    mapping = Mapping(8 * LARGE)
    mapping.expect(0, 8 * LARGE)
    mapping.bytes[:] = 1
    mapping.release(0, 8 * LARGE)
    assert held(mapping, "Rss") == 0
    mapping.bytes[4 * LARGE + 5] = 1
    assert held(mapping, "Rss") < LARGE // 8


@large
def test_an_arena_asks_for_large_pages_of_prompts_and_not_of_single_tokens() -> None:
    arena = Arena(65_792, torch.device("cpu"))
    for _ in range(100):
        pages = arena.take(1)
        arena.bytes[pages] = 1
    assert held(arena.mapping, "AnonHugePages") == 0
    before = held(arena.mapping, "Rss")  # with whatever the system lays beside it in the same range
    pages = arena.take(200)
    arena.bytes[pages] = 1
    assert held(arena.mapping, "AnonHugePages") >= 4 * LARGE
    assert held(arena.mapping, "Rss") - before <= 200 * arena.page_nbytes + 2**16


@linux
def test_without_large_pages_all_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "large_page", lambda: 0)
    mapping = Mapping(2**22)
    mapping.expect(0, 2**22)
    mapping.bytes[:] = 1
    mapping.release(4096, 2**21 + 5000)
    assert held(mapping, "AnonHugePages") == 0
    assert held(mapping, "Rss") == 2**22 - 2**21
