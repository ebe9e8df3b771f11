"""The laws for probes, which read attention and change nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.laws.base import (
    Problem,
    counted_work,
    deterministic,
    expect,
    expect_close,
    expect_equal,
    expect_growth,
    expect_refusal,
    poisoned_empty,
)  # fmt: skip
from saccade.laws.numeric import reversed_heads
from saccade.laws.settings import refuse_settings
from saccade.laws.subjects import Subject, packed, segments_of
from saccade.mechanisms.probe.run import watch

ROW = 2 * 4 * 48 * 8 * 2
"""Bytes of one query's weights and scores in the problems below: a workspace of so much makes chunks of few queries."""


def problems_of(subject: Subject, **sizes: Any) -> list[Problem]:
    """The inputs of two layers."""
    return [subject.problem(**{"queries": 48, "seed": seed, **sizes}) for seed in (0, 1)]


def reading(subject: Subject, problems: list[Problem], workspace: int = 2**26) -> Tensor:
    """What a fresh probe says of these layers, as a tensor."""
    probe = subject.card.build()
    for layer, problem in enumerate(problems):
        watch(problem.q, problem.k, probe, problem.geometry, layer, workspace=workspace)
    return torch.as_tensor(probe.result())


def agreement(subject: Subject) -> str:
    """1. fp32 inputs give the figure that fp64 gives."""
    gold = reading(subject, [p.to(torch.float64) for p in problems_of(subject)])
    got = reading(subject, problems_of(subject))
    expect_close(got, gold, "the reading of fp32 inputs, against fp64")
    return "fp32 and fp64"


def inert_padding(subject: Subject) -> str:
    """3. NaN in padded keys changes nothing."""
    subject.require("segments")
    ids = segments_of([[40], [48]], 48, subject.device)
    hidden = (ids < 0)[:, None, :, None]
    layers = [packed(p, ids) for p in problems_of(subject)]
    zero, nan = (
        [Problem(p.q, p.k.masked_fill(hidden, fill), p.v, p.geometry) for p in layers] for fill in (0.0, float("nan"))
    )
    expect_equal(reading(subject, nan), reading(subject, zero), "the reading with NaN in padding")
    return ""


def one_answer(subject: Subject) -> str:
    """5. Queries in chunks of any size = all at once."""
    layers = problems_of(subject)
    whole = reading(subject, layers)
    for rows in (1, 7):
        expect_close(reading(subject, layers, ROW * rows), whole, f"in chunks of about {rows} queries")
    return "in chunks of queries"


def independence(subject: Subject) -> str:
    """7. A sequence does not feel another; heads in another order give the same, in that order."""
    layers = problems_of(subject)
    whole = reading(subject, layers)
    alone = [reading(subject, [_item(p, i) for p in layers]) for i in range(2)]
    joined = torch.cat(alone) if whole.ndim and whole.shape[0] == 2 * alone[0].shape[0] else sum(alone) / 2
    expect_close(whole, torch.as_tensor(joined), "two sequences and each alone (or their mean)")
    checked = ["batch"]
    if not subject.card.heads_differ:
        other = reading(subject, [reversed_heads(p) for p in layers])
        share = layers[0].q.shape[1] // layers[0].k.shape[1]
        orders = [other] + [
            other.unflatten(axis, (-1, share)).flip(axis).flatten(axis, axis + 1)
            for axis, size in enumerate(other.shape)
            if size == layers[0].q.shape[1]
        ]
        fits = any(torch.allclose(one.double(), whole.double(), rtol=1e-4, atol=1e-6) for one in orders)
        expect(fits, "heads in another order give another reading")
        checked.append("head order")
    return ", ".join(checked)


def _item(problem: Problem, item: int) -> Problem:
    return problem.having(*(x[item : item + 1] for x in problem.leaves))


def everything_written(subject: Subject) -> str:
    """9. Every element is written."""
    layers = problems_of(subject)
    clean = reading(subject, layers)
    with poisoned_empty():
        expect_equal(reading(subject, layers), clean, "with poisoned memory")
    return ""


def refusals(subject: Subject) -> str:
    """10. No reading of nothing; wrong shapes and settings are refused by name."""
    good = problems_of(subject)[0]
    done = [
        expect_refusal(subject.card.build().result, "layer", "nothing observed"),
        expect_refusal(lambda: watch(good.q[0], good.k, subject.card.build()), "q of shape", "3-D q"),
    ]

    def smoke(settings: dict[str, Any]) -> None:
        probe = Subject(subject.card, subject.device, settings).mechanism
        watch(good.q, good.k, probe, good.geometry)
        probe.result()

    return ", ".join([*done, refuse_settings(subject.card, smoke)])


def determinism(subject: Subject) -> str:
    """12. The same inputs give the same bits."""
    with deterministic():
        first, second = (reading(subject, problems_of(subject)) for _ in range(2))
    expect_equal(second, first, "two readings")
    return ""


def complexity(subject: Subject) -> str:
    """13. Counted work at N and 2N grows as declared."""

    def work(tokens: int) -> float:
        layers = problems_of(subject, queries=tokens, batch=1)
        return counted_work(lambda: reading(subject, layers))

    return expect_growth(subject.card.complexity, work(384), work(768), "N=384 to 768")


def undo(subject: Subject) -> str:
    """14. Watching changes nothing it is shown."""
    layers = problems_of(subject)
    before = [x.clone() for p in layers for x in p.leaves]
    reading(subject, layers)
    for x, was in zip((x for p in layers for x in p.leaves), before, strict=True):
        expect_equal(x, was, "an input after watching")
    return "inputs unchanged by watching"


CHECKS = {
    1: agreement, 3: inert_padding, 5: one_answer, 7: independence, 9: everything_written, 10: refusals,
    12: determinism, 13: complexity, 14: undo,
}  # fmt: skip

REASONS = {
    2: "a probe reads; nothing flows back through it",
    4: "a probe reads all queries; nothing of it flows on to a token",
    6: "a probe has no budget: it changes no attention",
    8: "a probe computes no offsets: it sees bounded chunks of weights",
    11: "a probe keeps what it saw in Python and watches from outside a compiled graph",
    15: "not defined over shards of a sequence",
}
