"""Choosing an implementation, and the record of what ran."""

from __future__ import annotations

import threading

import pytest

from saccade.kernels import cpu
from saccade.ops.dispatch import (
    Implementation,
    RunRecord,
    choose,
    cpu_engine,
    density_of,
    is_recording,
    record,
    recording,
)

pytestmark = pytest.mark.quick


def small_only(call):
    return "too large" if call["size"] > 4 else None


IMPLEMENTATIONS = {
    "fast": Implementation("fast", lambda call: call, small_only),
    "slow": Implementation("slow", lambda call: call, lambda call: "odd" if call["size"] % 2 else None),
    "reference": Implementation("reference", lambda call: call),
}


def test_auto_takes_the_first_that_does_not_refuse():
    assert choose("op", IMPLEMENTATIONS, "auto", {"size": 2}) == (IMPLEMENTATIONS["fast"], {})
    assert choose("op", IMPLEMENTATIONS, "auto", {"size": 6}) == (IMPLEMENTATIONS["slow"], {"fast": "too large"})


def test_an_explicit_choice_runs_or_raises():
    assert choose("op", IMPLEMENTATIONS, "slow", {"size": 2})[0].name == "slow"
    assert choose("op", IMPLEMENTATIONS, "reference", {"size": 7})[0].name == "reference"
    with pytest.raises(ValueError, match="impl='fast': op cannot run it here: too large"):
        choose("op", IMPLEMENTATIONS, "fast", {"size": 6})
    with pytest.raises(ValueError, match="impl='turbo': op has 'auto', 'fast', 'slow', 'reference'"):
        choose("op", IMPLEMENTATIONS, "turbo", {"size": 2})


def test_auto_never_takes_the_reference():
    with pytest.raises(ValueError, match=r"op: no implementation can run this call: .*'fast': 'too large'.*'odd'"):
        choose("op", IMPLEMENTATIONS, "auto", {"size": 7})


def test_records_are_collected_inside_the_block_only():
    record(RunRecord("op", "before"))
    assert not is_recording()
    with recording() as outer:
        assert is_recording()
        record(RunRecord("op", "first"))
        with recording() as inner:
            record(RunRecord("op", "second", {"fast": "too large"}, 0.5))
        record(RunRecord("op", "third"))
    record(RunRecord("op", "after"))
    assert [entry.impl for entry in outer] == ["first", "third"]
    assert inner == [RunRecord("op", "second", {"fast": "too large"}, 0.5)]


def test_recording_ends_with_an_exception():
    with pytest.raises(KeyError), recording():
        raise KeyError
    assert not is_recording()


def test_other_threads_are_not_recorded():
    with recording() as records:
        worker = threading.Thread(target=lambda: record(RunRecord("op", "elsewhere")))
        worker.start()
        worker.join()
    assert records == []


def test_records_of_the_cpp_engine_say_the_instruction_set():
    with recording() as records:
        record(RunRecord("attend", "cpu"))
        record(RunRecord("attend", "eager"))
    assert records[0].instruction_set == cpu.instruction_set()
    assert str(records[0]) == ("attend:cpu" if cpu.missing() else f"attend:cpu ({cpu.instruction_set()})")
    assert str(records[1]) == "attend:eager"
    assert cpu_engine() == (cpu.missing() or cpu.instruction_set())


def test_density_is_what_was_run_after_choosing_or_what_the_selector_says():
    run = RunRecord
    assert density_of([]) is None
    assert density_of([run("attend", "eager", density=0.25), run("attend", "eager", density=0.5)]) == 0.75
    chosen = [run("attend", "eager", density=1.0), run("select", "x"), run("block_attend", "eager", density=0.2)]
    assert density_of(chosen) == 0.2
    assert density_of([run("select", "x", density=0.3), run("attend", "eager", density=1.0)]) == 0.3


def test_calls_to_fewer_keys_count_by_the_pairs_they_compute():
    fine = RunRecord("block_attend", "eager", density=0.25, pairs=64 * 64)
    coarse = RunRecord("block_attend", "eager", density=0.5, pairs=64 * 8)  # each key a mean of eight
    assert density_of([fine, coarse]) == 0.25 + 0.5 / 8
    assert density_of([RunRecord("select", "x"), coarse, fine]) == 0.25 + 0.5 / 8
    assert density_of([coarse]) == 0.5
    assert density_of([RunRecord("attend", "eager", density=1.0, pairs=0)]) == 1.0
