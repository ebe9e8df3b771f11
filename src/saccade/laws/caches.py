"""The laws for cache policies, driven over a stack of layers: a prompt, then token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.laws.base import (
    NotApplicable,
    Problem,
    deterministic,
    expect,
    expect_close,
    expect_equal,
    expect_falling,
    expect_growth,
    expect_refusal,
    poisoned_empty,
)  # fmt: skip
from saccade.laws.caches_padded import in_a_model, padding
from saccade.laws.numeric import SLACK, expect_within_twice, reversed_heads, unreversed
from saccade.laws.settings import refuse_settings
from saccade.laws.subjects import Subject
from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import CachePolicy, Everything
from saccade.mechanisms.cache.vattention import ContiguousStore
from saccade.types import Geometry

LAYERS = 4
PROMPT, STEPS = 40, 24
WHOLE = (PROMPT, *[1] * STEPS)
"""A prompt, then one token at a time."""


@dataclass(frozen=True)
class Driven:
    """Outputs `[layers, B, H, M, E]`, and bytes: held by all layers, addresses reserved, read in a step, of a token."""

    out: Tensor
    held: int
    reserved: int
    read: int
    stored: int


def drive(subject: Subject, problem: Problem, sizes: Sequence[int] = WHOLE, impl: str = "auto") -> Driven:
    """Feed the problem in pieces of these sizes; every layer sees the same q, k, v."""
    return drive_policy(subject.mechanism, problem, sizes, impl)


def drive_policy(policy: CachePolicy, problem: Problem, sizes: Sequence[int], impl: str = "auto") -> Driven:
    """As `drive`."""
    layers = CachedAttention.stack(policy, LAYERS)
    outputs, first = [], 0
    for size in sizes:
        piece = [x[:, :, first : first + size] for x in problem.leaves]
        outputs.append(torch.stack([layer(*piece, impl=impl) for layer in layers]))
        first += size
    bytes_held, bytes_read = sum(x.nbytes for x in layers), sum(x.bytes_read for x in layers)
    reserved = sum(x.kept.reserved_nbytes if isinstance(x.kept, ContiguousStore) else x.nbytes for x in layers)
    return Driven(torch.cat(outputs, 3), bytes_held, reserved, bytes_read, layers[0].kept.slot_nbytes)


def problem_of(subject: Subject, **sizes: Any) -> Problem:
    """Inputs for `WHOLE`."""
    return subject.problem(**{"queries": sum(WHOLE), **sizes})


def agreement(subject: Subject) -> str:
    """1. Error at most twice that of the same-dtype reference against fp64."""
    worst = 0.0
    for dtype in SLACK:
        problem = problem_of(subject, queries=12).to(dtype)
        runs = ((problem.to(torch.float64), "reference"), (problem, "reference"), (problem, "auto"))
        gold, low, got = ((drive(subject, p, (8, 1, 1, 1, 1), impl).out,) for p, impl in runs)
        worst = max(worst, expect_within_twice(gold, low, got, dtype))
    return f"largest error {worst:.0%} of what is allowed, forward only"


def causality(subject: Subject) -> str:
    """4. Perturbing tokens after t leaves outputs up to t bit-equal, within a prompt and from step to step."""
    problem = problem_of(subject)
    for sizes, moments in ((WHOLE, (1, 23, PROMPT, PROMPT + 9)), ((30, 30, 4), (17, 41))):
        whole = drive(subject, problem, sizes).out
        for t in moments:
            changed = [x.clone() for x in problem.leaves]
            for x in changed:
                x[:, :, t:] = x[:, :, t:].flip(2) * 3 + 1
            out = drive(subject, problem.having(*changed), sizes).out
            expect_equal(out[..., :t, :], whole[..., :t, :], f"outputs before token {t} after later tokens changed")
    return "in a prompt and from step to step"


def one_answer(subject: Subject) -> str:
    """5. Whole = in chunks = step by step; where only steps select, or pack, a prompt in chunks = fed whole."""
    if "chunks" in subject.card.supports:
        return _prompt_in_chunks(subject)
    subject.require("streaming")
    problem = problem_of(subject)
    whole = drive(subject, problem, (sum(WHOLE),)).out
    for sizes in (WHOLE, (1, 30, 2, 31), [1] * sum(WHOLE)):
        expect_close(drive(subject, problem, sizes).out, whole, f"in {len(sizes)} pieces and whole")
    return "chunks and steps"


def _prompt_in_chunks(subject: Subject) -> str:
    problem, steps = problem_of(subject), [1] * STEPS
    whole = drive(subject, problem).out
    for chunks in ((17, 2, PROMPT - 19), (PROMPT - 2, 2), [2] * (PROMPT // 2)):
        expect_close(
            drive(subject, problem, (*chunks, *steps)).out, whole, f"a prompt in {len(chunks)} chunks and whole"
        )
    return "a prompt in chunks and fed whole, and the steps after it"


def budgets(subject: Subject) -> str:
    """6. At full budget equal to dense; along the ladder the error falls and what is held and read does not."""
    card, notes = subject.card, []
    if card.exact is None and card.ladder is None:
        raise NotApplicable("the card names no setting at which it equals dense attention, and no ladder")
    problem = problem_of(subject, batch=1)
    dense = subject.dense(replace(problem, geometry=Geometry(causal=True)))
    tokens = sum(WHOLE)
    if card.exact is not None:
        full = Subject(card, subject.device, card.exact(tokens))
        for sizes in (WHOLE, (tokens,)):
            expect_close(drive(full, problem, sizes).out, dense.expand(LAYERS, *dense.shape), "at full budget")
        notes.append(f"equal to dense at {card.exact_when}")
    if card.ladder is not None:
        runs = [drive(Subject(card, subject.device, s), problem) for s in card.ladder(tokens)]
        errors = [float((run.out - dense)[..., PROMPT:, :].norm() / dense.norm()) for run in runs]
        notes.append(expect_falling(errors))
        for what in ("held", "read"):
            counts = [getattr(run, what) for run in runs]
            expect(counts == sorted(counts), f"bytes {what} fall along the ladder: {counts}")
    return "; ".join(notes)


def independence(subject: Subject) -> str:
    """7. A sequence does not feel its batch, heads carry no order; at full budget GQA equals repeated heads."""
    card, problem = subject.card, problem_of(subject)
    whole = drive(subject, problem).out
    alone = drive(subject, problem.having(*(x[1:] for x in problem.leaves))).out
    expect_close(alone, whole[:, 1:], "a sequence alone and in its batch")
    checked = ["batch"]
    if not card.heads_differ:
        out = drive(subject, reversed_heads(problem)).out
        expect_close(torch.stack([unreversed(x, problem) for x in out]), whole, "heads in another order")
        checked.append("head order")
    if "gqa" in card.supports and card.exact is not None:
        full = Subject(card, subject.device, card.exact(sum(WHOLE)))
        share = problem.q.shape[1] // problem.k.shape[1]
        repeated = [x.repeat_interleave(share, 1) for x in problem.leaves[1:]]
        out = drive(full, problem.having(problem.q, *repeated)).out
        expect_close(out, drive(full, problem).out, "grouped and repeated key/value heads")
        checked.append("grouped heads at full budget (below it the heads of a group may share one choice)")
    return ", ".join(checked)


def everything_written(subject: Subject) -> str:
    """9. Every element of the output is written."""
    problem = problem_of(subject)
    clean = drive(subject, problem).out
    with poisoned_empty():
        expect_equal(drive(subject, problem).out, clean, "with poisoned memory")
    return ""


def refusals(subject: Subject) -> str:
    """10. Tokens that do not fit, each other or what is stored, and bad settings are refused by name."""
    q, k, v = (x[:, :, :8] for x in problem_of(subject).leaves)

    def layer() -> CachedAttention:
        return CachedAttention(subject.mechanism)

    def twice(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
        cached = layer()
        cached(*first)
        cached(*second)

    done = [
        expect_refusal(lambda: layer()(q[0], k, v), "q of shape", "3-D q"),
        expect_refusal(lambda: layer()(q[:, :, :5], k, v), "q", "fewer queries than keys"),
        expect_refusal(lambda: layer()(q, k[..., :-1], v), "k of shape", "k of another head dim"),
        expect_refusal(lambda: layer()(q, k, v[:, :, :-1]), "v of shape", "v of another length"),
        expect_refusal(lambda: twice((q, k, v), (q[:1], k[:1], v[:1])), "k of shape", "another batch than stored"),
        expect_refusal(lambda: twice((q, k, v), (q, k, v[..., :-1])), "v of shape", "another value dim than stored"),
    ]

    def smoke(settings: dict[str, Any]) -> None:
        drive(Subject(subject.card, subject.device, settings), problem_of(subject))

    return ", ".join([*done, refuse_settings(subject.card, smoke)])


def determinism(subject: Subject) -> str:
    """12. Two sequences are equal to the bit, the second not touched by the first."""
    problem = problem_of(subject)
    with deterministic():
        first, second = (drive(subject, problem).out for _ in range(2))
    expect_equal(second, first, "two runs")
    return "forward"


def complexity(subject: Subject) -> str:
    """13. A step reads no more than declared as the past grows; what the card claims to save is saved."""
    runs = [drive(subject, problem_of(subject, queries=n + 4), (n, 1, 1, 1, 1)) for n in (256, 512)]
    note = expect_growth(subject.card.complexity, runs[0].read, runs[1].read, "a past of 256 to 512, bytes read a step")
    return f"{note}; {effects(subject)}"


def effects(subject: Subject) -> str:
    """Of 13: what the card claims to save is saved, against the same calls with everything kept, read and stored."""
    problem, sizes = problem_of(subject, queries=516), (512, 1, 1, 1, 1)
    run, dense = (drive_policy(policy, problem, sizes) for policy in (subject.mechanism, Everything()))
    measured = {
        "evicting": ("held", run.held / dense.held),
        "selecting": ("read", run.read / dense.read),
        "packing": ("stored of a token", run.stored / dense.stored),
        "offloading": ("held here", run.held / dense.held),
        "mapping": ("held of those reserved", run.held / max(run.reserved, 1)),
    }
    for effect in subject.card.effects:
        what, share = measured[effect]
        expect(share < 0.9, f"{effect}: bytes {what} are {share:.0%} of what dense attention takes")
    return "of dense attention's bytes: " + ", ".join(f"{what} {share:.0%}" for what, share in measured.values())


CHECKS = {
    1: agreement, 3: padding, 4: causality, 5: one_answer, 6: budgets, 7: independence, 9: everything_written,
    10: refusals, 12: determinism, 13: complexity, 14: in_a_model,
}  # fmt: skip

REASONS = {
    2: "a cache serves inference: the card lists no gradients",
    8: "its offsets are those of the engines, which tests/laws/test_engines.py covers",
    11: "a cache changes its shape with every token and holds state: it runs around compiled engines",
    15: "not defined over shards of a sequence",
}
