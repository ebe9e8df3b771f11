"""The measuring itself."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from saccade.bench.cases import random_layout
from saccade.bench.measure import (
    can_measure_peak,
    describe_machine,
    interleaved,
    keeping_memory,
    median,
    peak_bytes,
)  # fmt: skip
from saccade.kernels import cpu


def test_rounds_are_interleaved_and_rotate():
    seen = []
    found = interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=3, warmup=1)
    assert sorted(seen) == ["a"] * 4 + ["b"] * 4
    assert seen[:2] in (["a", "b"], ["b", "a"])
    assert seen[2:4] != seen[4:6]
    assert [len(values) for values in found.values()] == [3, 3]


def test_something_may_run_untimed_before_every_call(monkeypatch):
    seen = []
    monkeypatch.setattr("saccade.bench.measure.time.perf_counter", lambda: float(len(seen)))
    found = interleaved({"a": lambda: seen.append("a")}, rounds=2, before=lambda: seen.extend("----"))
    assert "".join(seen) == "----a" * 3
    assert found == {"a": [1.0, 1.0]}


def test_median_of_even_and_odd():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([1.0, 3.0]) == 2.0


@pytest.mark.skipif(not can_measure_peak(), reason="this system does not let a process reset its peak memory")
def test_peak_memory_of_a_known_allocation():
    def allocate():
        torch.ones(64 * 2**20 // 4).sum()

    assert 60 * 2**20 < peak_bytes(allocate) < 96 * 2**20
    assert peak_bytes(lambda: None) < 8 * 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to keep memory")
def test_memory_is_kept_for_the_next_call_and_given_back():
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(64 * 2**20 // 4)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    fresh = faults()
    with keeping_memory():
        first, *later = (faults() for _ in range(8))
    assert first > fresh / 2
    assert median(later) < fresh / 16  # a small block may settle in what was freed, and one call find too little left
    assert faults() > fresh / 2


def test_the_machine_is_described():
    machine = describe_machine()
    assert machine.cores >= 1
    assert machine.gemm_gflops > 0
    assert machine.gemm_bf16_gflops > 0
    assert machine.read_gbytes > 0
    assert machine.engine == (cpu.missing() or cpu.instruction_set())
    assert machine.to_json()["torch"] == torch.__version__


def test_random_layout_keeps_the_wanted_share():
    layout = random_layout(4096, 0.25)
    layout.validate()
    assert layout.density(causal=True) == pytest.approx(0.25, abs=0.03)
