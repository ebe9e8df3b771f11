"""The harness of `saccade bench ops`, on cases made here, and a smoke run of real ones."""

from __future__ import annotations

import re

import pytest
import torch

from saccade.bench.case import Case, Peer, Work
from saccade.bench.cases import cases
from saccade.bench.ops import COLUMNS, bench_ops, difference, run_case, select_cases
from saccade.kernels import cpu
from saccade.ops import attend


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def call(self, seconds: float):
        def run() -> torch.Tensor:
            self.now += seconds
            return torch.ones(3)

        return run

    def work(self, ours: float, **peers: float) -> Work:
        calls = {name: Peer(self.call(seconds)) for name, seconds in peers.items()}
        return Work(self.call(ours), calls, flops=3e9, bytes=10**9)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("saccade.bench.measure.time.perf_counter", lambda: clock.now)
    return clock


def steady() -> float:
    return 100.0


def test_ratios_say_how_much_longer_the_peers_take(clock):
    outcome = run_case(Case("a", lambda: clock.work(2.0, slow=20.0, fast=1.0)), 7, steady)
    assert outcome.ours == 2.0
    assert outcome.ratios == {"slow": 10.0, "fast": 0.5}
    assert outcome.errors == {"slow": 0.0, "fast": 0.0}
    assert outcome.gflops == 1.5
    assert outcome.gbytes == 0.5
    assert not outcome.noisy
    rows = outcome.rows()
    assert [row[4] for row in rows] == ["fast", "slow"]
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert outcome.to_json()["ratios"] == outcome.ratios


def test_the_middle_half_of_the_rounds_is_told(clock):
    work = clock.work(2.0)
    varying = iter([9.0] * 2 + [1.0, 2.0, 3.0, 4.0, 5.0])  # the comparison of results, the warm-up, the rounds

    def slow() -> torch.Tensor:
        return clock.call(next(varying))()

    work.peers["slow"] = Peer(slow, 2.0)
    outcome = run_case(Case("a", lambda: work), 5, steady)
    assert outcome.spreads == {"": (2.0, 2.0), "slow": (2.0, 4.0)}
    assert outcome.rows()[0][2] == "2000.00 ms (2000.00 to 2000.00)"
    assert outcome.rows()[0][6] == "3.00x (2.00 to 4.00)"


def test_a_share_of_a_peers_time_is_what_counts(clock):
    work = clock.work(2.0)
    work.peers["quarter"] = Peer(clock.call(4.0), 0.25, same=False)
    outcome = run_case(Case("a", lambda: work), 7, steady)
    assert outcome.ratios == {"quarter": 0.5}
    assert outcome.errors == {}


@pytest.mark.parametrize(
    ("readings", "noisy", "taken"),
    [([100, 91], False, 2), ([100, 85, 100, 95], False, 4), ([100, 120, 100, 80], True, 4)],
)
def test_a_case_is_run_again_where_the_thermometer_moved(clock, readings, noisy, taken):
    left = list(readings)
    outcome = run_case(Case("a", lambda: clock.work(1.0)), 1, lambda: float(left.pop(0)))
    assert outcome.noisy is noisy
    assert len(readings) - len(left) == taken
    assert outcome.thermometer == tuple(readings[taken - 2 :])
    assert outcome.rows()[0][0] == ("a (noisy)" if noisy else "a")


def test_cases_and_peers_that_cannot_run_say_why(clock):
    def prepare() -> Work:
        raise ValueError("no engine")

    skipped = run_case(Case("a", prepare), 1, steady)
    assert skipped.skipped == {"case": "no engine"}
    assert skipped.ours is None
    assert skipped.ratios == {}
    assert "skipped: no engine" in skipped.rows()[0]
    assert len(skipped.rows()[0]) == len(COLUMNS)

    def broken() -> None:
        raise RuntimeError("no kernel\nand a long trace")

    work = clock.work(1.0)
    work.peers["broken"] = Peer(broken)
    outcome = run_case(Case("a", lambda: work), 1, steady)
    assert outcome.skipped == {"broken": "RuntimeError: no kernel"}
    assert outcome.rows()[0][4:6] == ("broken", "skipped: RuntimeError: no kernel")


def test_a_peer_with_another_result_is_marked():
    work = Work(lambda: torch.ones(4), {"other": Peer(lambda: torch.ones(4) * 1.5)})
    outcome = run_case(Case("a", lambda: work), 1, steady)
    assert outcome.errors["other"] == pytest.approx(0.5)
    assert outcome.rows()[0][4] == "other (another result!)"
    assert difference((torch.ones(2), torch.zeros(2)), (torch.ones(2), torch.zeros(2))) == 0.0
    assert difference((torch.ones(2), torch.ones(2) * 3), (torch.ones(2), torch.ones(2) * 2)) == 0.5


def test_cases_are_chosen_by_their_names():
    known = cases()
    names = [case.name for case in known]
    assert len(set(names)) == len(names)
    chosen = select_cases(known, r"decode.*bf16")
    assert chosen
    assert all("decode" in case.name and "bf16" in case.name for case in chosen)
    assert select_cases(known, None) == known
    with pytest.raises(ValueError, match=re.escape("only='(': not a regular expression")):
        select_cases(known, "(")
    with pytest.raises(ValueError, match="only='nothing': matches no case, such as 'dense causal"):
        select_cases(known, "nothing")
    with pytest.raises(ValueError, match="rounds=5: expected at least 7"):
        bench_ops(rounds=5)


def test_the_table_of_the_issue_is_covered():
    names = " | ".join(case.name for case in cases())
    for what in (
        "dense causal N=1,024 D=64 fp32 forward", "dense full N=4,096 D=128 bf16 forward",
        "dense causal N=16,384 D=128 bf16 forward", "dense full N=16,384 D=128 2 heads fp32 forward",
        "dense causal N=16,384 D=128 2 heads bf16 forward+backward", "window 1,024 N=16,384",
        "blocks 25% of 64 N=4,096 D=64 bf16 forward",
        "blocks 25% of 64 N=4,096 D=64 fp32 forward+backward", "decode cache=131,072",
        "decode cache=32,768 D=128 int8", "top-k 1,024 of 32,768",
        "top-k 4,096 of 131,072", "neighbourhood 56x56 of 7x7 B=8", "scan scalar decay N=131,072",
        "scan scalar decay N=131,072 D=64 fp32 forward, memory held",
        "choosing moba N=16,384",
    ):  # fmt: skip
        assert what in names


@pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}")
def test_small_cases_run_and_agree_with_their_peers():
    seen, said = [], []
    outcomes = bench_ops(
        quick=True,
        only="dense.*fp32|window.*fp32|blocks 25.*fp32|decode.*(fp32|int)|top-k.*fp32",
        rounds=1,
        starting=said.append,
        progress=seen.append,
    )
    assert seen == outcomes
    assert said == [f"{number} of 12: {outcome.name}" for number, outcome in enumerate(outcomes, 1)]
    assert len(outcomes) == 12
    for outcome in outcomes:
        assert outcome.engine.endswith(":cpu")
        assert outcome.ours > 0
        assert outcome.errors
        assert max(outcome.errors.values()) < 1e-4


def test_maps_run_and_agree_with_their_peers():
    (outcome,) = bench_ops(quick=True, only="neighbourhood.*fp32 forward$", rounds=1)
    assert set(outcome.errors) == {"unfold + matmul", "SDPA per map row"}
    assert max(outcome.errors.values()) < 1e-4


def test_peak_memory_is_that_of_ours():
    x = torch.randn(1, 1, 64, 8)
    work = Work(lambda: attend(x, x, x), {"large": Peer(lambda: torch.ones(2**26), same=False)})
    outcome = run_case(Case("a", lambda: work), 1, steady)
    assert outcome.peak_bytes is None or outcome.peak_bytes < 2**26
    assert outcome.result_bytes == x.nbytes
    assert outcome.to_json()["result_bytes"] == x.nbytes
