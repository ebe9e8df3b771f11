"""Searches in a graph of keys against sets and lists written here: storages, lengths, instruction sets, threads."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.kernels import cpu
from saccade.ops import KeyGraph, search_graph
from saccade.types import KVPages

pytestmark = pytest.mark.quick

needs_engine = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")
LENGTHS = torch.tensor(((150, 70, 3), (2, 0, 64)))
SIZES = {"pages": (128, 64), "odd": (30, 7)} if "SACCADE_SANITIZED" in os.environ else {
    "pages": (128, 64), "tail": (40, 16), "odd": (30, 7)
}  # fmt: skip


def problem(dim: int, page: int, dtype: torch.dtype, bits: int | None) -> tuple[Tensor, KVPages, KeyGraph]:
    """Graphs with empty places, numbers met twice, and slots that some heads do not have."""
    generator = torch.Generator().manual_seed(dim)
    k, v = (torch.randn(2, 3, 150, size, generator=generator).to(dtype) for size in (dim, 4))
    cache = KVPages.from_dense(k, v, lengths=LENGTHS, page_size=page, bits=bits, zero_point=bits == 4)
    shapes = ((150, 20, 6), (20, 150, 2), (150, 5))
    lists, links, entries = (
        torch.randint(-1, most, (2, 3, *size), generator=generator, dtype=torch.int32) for most, *size in shapes
    )
    q = torch.randn(2, 6, 1, dim, generator=generator).to(dtype)
    return q, cache, KeyGraph(lists, links, entries)


def reader(cache: KVPages):
    keys = cache.to_dense(torch.float32)[0]
    return lambda slots: keys[slots]


def searched(q: Tensor, keys: Tensor, length: int, graph: list, width: int, expand: int) -> tuple[list[int], int, int]:
    """One head's: slots, keys scored, numbers read."""
    lists, links, near = graph
    kept, met, followed, numbers = [], set(), set(), 0
    while True:
        new = {j for j in near if 0 <= j < length} - met
        met |= new
        kept = sorted([*kept, *new], key=lambda j: -float(q @ keys[j]))[:width]
        chosen = [j for j in kept if j not in followed][:expand]
        if not chosen:
            return kept, len(met), numbers
        followed |= set(chosen)
        queries = [i for j in chosen for i in links[j] if i >= 0]
        near = [j for i in queries for j in lists[i]]
        numbers += len(queries) + sum(0 <= j < length for j in near)


@pytest.mark.parametrize("impl", ["cpu", "eager"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "expand"), [(1, 1), (9, 3), (40, 100), (200, 16)])
def test_the_search(impl: str, size: str, bits: int | None, dtype: torch.dtype, width: int, expand: int) -> None:
    if impl == "cpu" and cpu.missing() is not None:
        pytest.skip(f"no C++ engine: {cpu.missing()}")
    q, cache, graph = problem(*SIZES[size], dtype, bits)
    keys = cache.to_dense(torch.float64)[0]
    expected, read, numbers = [], 0, 0
    for b in range(2):
        for h in range(6):
            g = h // 2
            one = [x[b, g].tolist() for x in graph]
            slots, *counts = searched(q[b, h, 0].double(), keys[b, g], int(LENGTHS[b, g]), one, width, expand)
            expected.append(slots + [-1] * (width - len(slots)))
            read, numbers = read + counts[0], numbers + counts[1]
    for name in cpu.INSTRUCTION_SETS if impl == "cpu" else [None]:
        if name is not None and cpu.use(name) is None:
            continue
        try:
            found = search_graph(q, graph, LENGTHS, reader(cache), width, expand, cache=cache, impl=impl)
        finally:
            if name is not None:
                cpu.use(None)
        assert found.slots.flatten(0, 1).tolist() == expected
        assert (found.keys, found.numbers) == (read, numbers)


@needs_engine
def test_threads_strides_and_channels() -> None:
    q, cache, graph = problem(40, 16, torch.float32, None)
    factors = torch.rand(2, 3, 40) + 0.5
    keys = cache.to_dense(torch.float32)[0] * factors[:, :, None]
    expected = search_graph(q, graph, LENGTHS, lambda slots: keys[slots], 12, 4, impl="eager")
    apart = torch.zeros(*q.shape[:3], 50)
    apart[..., :40] = q
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            found = search_graph(
                apart[..., :40], graph, LENGTHS, reader(cache), 12, 4, cache=cache, channels=factors, impl="cpu"
            )
            assert torch.equal(found.slots, expected.slots)
            assert found[1:] == expected[1:]
    finally:
        torch.set_num_threads(threads)


def test_fp64_and_keys_without_pages_are_searched_in_pytorch() -> None:
    q, cache, graph = problem(30, 7, torch.float32, None)
    expected = search_graph(q, graph, LENGTHS, reader(cache), 5, 2, impl="eager")
    assert torch.equal(search_graph(q, graph, LENGTHS, reader(cache), 5, 2).slots, expected.slots)
    with pytest.raises(ValueError, match="search_graph cannot run it here: keys do not lie in pages"):
        search_graph(q, graph, LENGTHS, reader(cache), 5, 2, impl="cpu")
    wide = search_graph(q.double(), graph, LENGTHS, reader(cache), 5, 2, cache=replace(cache))
    assert torch.equal(wide.slots, expected.slots)


def test_bad_calls() -> None:
    q, cache, graph = problem(30, 7, torch.float32, None)
    keys = reader(cache)
    with pytest.raises(ValueError, match=r"q of shape \(2, 6, 2, 30\): expected \[B, H, 1, D\]"):
        search_graph(q.expand(-1, -1, 2, -1), graph, LENGTHS, keys, 5, 2)
    with pytest.raises(ValueError, match=r"graph.links of shape \(2, 3, 150, 2\), torch.int64: expected int32"):
        search_graph(q, graph._replace(links=graph.links.long()), LENGTHS, keys, 5, 2)
    with pytest.raises(ValueError, match=r"graph.lists of shape \(1, 3, 20, 6\), torch.int32: expected int32, beginn"):
        search_graph(q, graph._replace(lists=graph.lists[:1]), LENGTHS, keys, 5, 2)
    for name in ("width", "expand"):
        with pytest.raises(ValueError, match=f"{name}=0: expected at least 1"):
            search_graph(q, graph, LENGTHS, keys, **({"width": 5, "expand": 2} | {name: 0}))
    with pytest.raises(ValueError, match="impl='triton': search_graph has 'auto', 'cpu', 'eager'"):
        search_graph(q, graph, LENGTHS, keys, 5, 2, impl="triton")
