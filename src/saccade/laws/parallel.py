"""The laws for parallel mechanisms: 2 and 4 processes against one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.laws.base import expect_close, expect_equal, expect_refusal
from saccade.laws.numeric import NAMES, SLACK, expect_within_twice
from saccade.laws.processes import Case, Results, run_ranks
from saccade.laws.settings import refuse_settings
from saccade.laws.subjects import Subject
from saccade.ops import attend
from saccade.types import Pattern

SHARDS = ((5, 4), (0, 7), (6, 6), (3, 0, 5, 2), (2, 4, 1, 3))
"""Keys of each rank: two ranks and four, even, uneven and empty."""


def cases_of(subject: Subject) -> tuple[Case, ...]:
    """Every shards with and without causality as far as the card goes, then the first one in lower dtypes."""
    groups = 2 if "gqa" in subject.card.supports else 4
    patterns, cases = subject.card.patterns, []
    for causal in (True, False):
        if not patterns & ({Pattern.CAUSAL_SELF} if causal else {Pattern.NONCAUSAL_SELF}):
            continue
        for number, sizes in enumerate(SHARDS):
            few = 1 if number % 2 else 5
            queries = sum(sizes) if "q" in subject.mechanism.sharded else few
            cases.append(Case(sizes, queries, causal, groups))
    return (*cases, *(replace(cases[0], dtype=str(dtype).removeprefix("torch.")) for dtype in SLACK))


def results_of(subject: Subject) -> tuple[tuple[Case, ...], Results]:
    """All cases and what the ranks found; the processes run once for all laws."""
    cases = cases_of(subject)
    return cases, run_ranks(subject.card, dict(subject.card.example), cases)


def one_process(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Output and gradients of exact attention in one process."""
    q, k, v, cotangent = (x.to(dtype) for x in case.inputs())

    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, causal=case.causal, impl="reference")
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent)


def joined(subject: Subject, case: Case, number: int, results: Results, name: str) -> list[Tensor]:
    """What the ranks found, as the whole: one tensor where they hold shards, each rank's where all hold the whole."""
    parts = [results[number, rank][name] for rank in range(len(case.sizes))]
    source = {"dk": "k", "dv": "v"}.get(name, "q")
    return [torch.cat(parts, 2)] if source in subject.mechanism.sharded else parts


def agreement(subject: Subject) -> str:
    """1. Error at most twice that of the same-dtype reference in one process against fp64."""
    cases, results = results_of(subject)
    worst = 0.0
    for number, case in enumerate(cases):
        dtype = getattr(torch, case.dtype)
        if dtype not in SLACK:
            continue
        gold, low = one_process(case), one_process(case, dtype)
        for name, g, b in zip(NAMES, gold, low, strict=True):
            for x in joined(subject, case, number, results, name):
                worst = max(worst, expect_within_twice([g], [b], [x], dtype, [name]))
    return f"largest error {worst:.0%} of what is allowed"


def sharding(subject: Subject) -> str:
    """15. Outputs and gradients over uneven and empty shards equal one process's."""
    cases, results = results_of(subject)
    for number, case in enumerate(cases):
        if case.dtype != "float64":
            continue
        for name, wanted in zip(NAMES, one_process(case), strict=True):
            for x in joined(subject, case, number, results, name):
                expect_close(x, wanted, f"{name} over shards of {case.sizes}, causal={case.causal}", 1e-10)
    worlds = sorted({len(case.sizes) for case in cases})
    return f"outputs and gradients over {' and '.join(map(str, worlds))} processes, shards uneven and empty"


def exactness(subject: Subject) -> str:
    """6. Equal to dense attention where the card says so."""
    sharding(subject)
    return f"equal to dense attention in one process, {subject.card.exact_when}"


def _expect_same(subject: Subject, name: str, what: str) -> None:
    cases, results = results_of(subject)
    for number, case in enumerate(cases):
        for rank in range(len(case.sizes)):
            found = results[number, rank]
            expect_equal(found[name], found["out"], f"{what}, rank {rank} of shards {case.sizes}")


def independence(subject: Subject) -> str:
    """7. A batch entry alone gives what it gives in its batch."""
    cases, results = results_of(subject)
    for number, case in enumerate(cases):
        for rank in range(len(case.sizes)):
            found = results[number, rank]
            tolerance = 1e-2 if case.dtype == "bfloat16" else 1e-5
            expect_close(found["alone"], found["out"][:1], "a batch entry alone and in its batch", tolerance)
    return "batch"


def everything_written(subject: Subject) -> str:
    """9. Every element of the output is written."""
    _expect_same(subject, "poisoned", "with poisoned memory")
    return ""


def determinism(subject: Subject) -> str:
    """12. The same call gives the same bits on every rank."""
    _expect_same(subject, "again", "two runs")
    return "forward"


def refusals(subject: Subject) -> str:
    """10. A missing process group, wrong shapes and bad settings are refused by name."""
    q, k, v, _ = Case((5,), 3, causal=False, groups=2, dtype="float32").inputs()
    call = subject.mechanism
    done = [
        expect_refusal(lambda: call(q, k, v), "torch.distributed is not initialised", "no process group"),
        expect_refusal(lambda: call(q[0], k, v), "q of shape", "3-D q"),
        expect_refusal(lambda: call(q, k, v[:, :, :-1]), "v of shape", "v of another length"),
    ]
    return ", ".join([*done, refuse_settings(subject.card, lambda settings: subject.card.build(**settings))])


CHECKS = {
    1: agreement, 6: exactness, 7: independence, 9: everything_written, 10: refusals, 12: determinism, 15: sharding,
}  # fmt: skip

REASONS = {
    2: "gradients pass through collectives: law 15 compares them with those of one process",
    3: "the card does not list 'segments'",
    4: "law 15 compares causal outputs with those of one process",
    5: "the card does not list 'streaming'",
    8: "a shard's offsets are those of the engines, which tests/laws/test_engines.py covers",
    11: "collectives between processes are not traced",
    13: "its work is that of the engine `attend` on each rank's keys",
    14: "recipes choose attention on one device",
}
