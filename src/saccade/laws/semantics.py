"""Laws about meaning: padding, causality, one answer however the sequence is cut, and budgets (3, 4, 5, 6)."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from saccade.laws.base import NotApplicable, Problem, expect, expect_close, expect_equal, expect_falling, gradients
from saccade.laws.subjects import Subject, packed, segments_of
from saccade.types import Kind

BLOCK_CAUSAL = "causal at block granularity"
"""Words in a card's deviations when a choice is shared by the queries of a block."""

NOT_CAUSAL = "the output is not causal"
"""Words in a card's deviations when weights are zero for the future but depend on it all the same."""


def grain(subject: Subject) -> int:
    """Least common multiple of the block-like settings: where cutting a sequence does not cut a block."""
    sizes = [1]
    if is_dataclass(subject.mechanism):
        for field in fields(subject.mechanism):
            value = getattr(subject.mechanism, field.name)
            is_block = any(word in field.name for word in ("block", "chunk", "group", "segment", "size"))
            if is_block and isinstance(value, int) and not isinstance(value, bool) and value > 0:
                sizes.append(value)
    return math.lcm(*sizes)


def inert_padding(subject: Subject) -> str:
    """3. Rows that see nothing give 0 and zero gradients; NaN in padded keys and values goes nowhere."""
    subject.require("segments")
    length, pad = 96, 17
    problem = subject.problem(queries=length)
    ids = segments_of([[length - pad], [length]], length, subject.device)
    clean = packed(problem, ids)
    hidden = (ids < 0)[:, None, :, None]
    bad = clean.having(problem.q, *(x.masked_fill(hidden, float("nan")) for x in (problem.k, problem.v)))
    zeroed = clean.having(problem.q, *(x.masked_fill(hidden, 0.0) for x in (problem.k, problem.v)))
    (out, grads), (wanted, wanted_grads) = (
        gradients(subject.run, p) if "backward" in subject.card.supports else (subject.run(p), ())
        for p in (bad, zeroed)
    )
    expect_close(out, wanted, "NaN in padding", 1e-6)
    for name, got, zero in zip(("dq", "dk", "dv"), grads, wanted_grads, strict=False):
        expect_close(got, zero, f"{name} with NaN in padding", 1e-5)
    empty_rows = out.masked_select(hidden.expand_as(out))
    expect(bool((empty_rows == 0).all()), "a padded query's output is not 0")
    for name, got in zip(("dq",), grads, strict=False):
        expect(bool((got.masked_select(hidden.expand_as(got)) == 0).all()), f"a padded query's {name} is not 0")
    return ""


def causality(subject: Subject) -> str:
    """4. Perturbing tokens after t leaves outputs up to t bit-equal."""
    subject.require_causal()
    lines = subject.card.deviations
    by_block = any(BLOCK_CAUSAL in line for line in lines)
    prefill_only = subject.card.prefill_only
    values_only = bool(prefill_only) or any(NOT_CAUSAL in line for line in lines)
    step = grain(subject) if by_block else 1
    length = max(96, 4 * step)
    problem = subject.problem(queries=length)
    whole = subject.run(problem)
    moments = [t * step for t in range(1, length // step)] if by_block else [1, 37, 64, length - 1]
    for t in moments[:6]:
        changed = [x.clone() for x in problem.leaves]
        for x in changed[2:] if values_only else changed:
            x[:, :, t:] = x[:, :, t:].flip(2) * 3 + 1
        out = subject.run(problem.having(*changed))
        expect_equal(out[:, :, :t], whole[:, :, :t], f"outputs before token {t} after later tokens changed")
    if prefill_only:
        raise NotApplicable(f"prefill only, later values alone were seen not to matter: {prefill_only}")
    if values_only:
        return f"later values only, because {NOT_CAUSAL} by its card: its weights depend on later queries and keys"
    return f"at block boundaries, every {step} tokens: {BLOCK_CAUSAL}" if by_block else ""


def one_answer(subject: Subject) -> str:
    """5. Whole = in chunks = step by step = packed = left-padded."""
    subject.require_causal()
    if subject.card.prefill_only:
        raise NotApplicable(f"prefill only: {subject.card.prefill_only}")
    subject.require("streaming")
    problem = subject.problem(queries=96)
    whole = subject.run(problem)
    done = []
    if subject.card.kind is Kind.MIXER:
        expect_close(_carried(subject, problem, [40, 1, 1, 54]), whole, "carried in pieces", 1e-4)
        done.append("chunks and steps with the carried state")
    else:
        for first in (32, 50, 95):
            late = Problem(problem.q[:, :, first:], problem.k, problem.v, problem.geometry)
            expect_close(subject.run(late), whole[:, :, first:], f"the last {96 - first} queries over a warm cache")
        done.append("chunks and steps over a warm cache")
    if "segments" in subject.card.supports:
        _packed_and_padded(subject, problem)
        done.append("packed and left-padded")
    return ", ".join(done)


def _carried(subject: Subject, problem: Problem, sizes: list[int]) -> Tensor:
    state, parts, start = None, [], 0
    for size in sizes:
        piece = (x[:, :, start : start + size] for x in problem.leaves)
        out, state = subject.mechanism(*piece, geometry=problem.geometry, state=state, return_state=True)
        parts.append(out)
        start += size
    return torch.cat(parts, 2)


def _packed_and_padded(subject: Subject, problem: Problem) -> None:
    """A sequence packed behind another, or behind padding, gives what it gives alone (cut where blocks begin)."""
    step = grain(subject)
    first = -(-40 // step) * step
    length = first + 48
    problem = subject.problem(queries=length)
    for lengths, what in (([[first, 48]] * 2, "packed"), ([[48]] * 2, "left-padded")):
        out = subject.run(packed(problem, segments_of(lengths, length, subject.device)))
        alone = problem.having(*(x[:, :, first:] for x in problem.leaves))
        expect_close(out[:, :, first:], subject.run(alone), f"{what} and alone")
        if what == "packed":
            alone = problem.having(*(x[:, :, :first] for x in problem.leaves))
            expect_close(out[:, :, :first], subject.run(alone), "first of a pack and alone")


def budgets(subject: Subject) -> str:
    """6. At full budget equal to dense; the error falls along the ladder."""
    card = subject.card
    if card.exact is None and card.ladder is None:
        raise NotApplicable("the card names no setting at which it equals dense attention, and no ladder")
    length = 256
    notes = []
    problem = subject.problem(queries=length, batch=1)
    dense = subject.dense(problem)
    if card.exact is not None:
        full = Subject(card, subject.device, card.exact(length))
        expect_close(full.run(problem), dense, f"at {dict(card.exact(length))}, against dense", 1e-4)
        notes.append(f"equal to dense at {card.exact_when}")
    if card.ladder is not None:
        errors = [_error(Subject(card, subject.device, settings), problem, dense) for settings in card.ladder(length)]
        notes.append(expect_falling(errors))
    return "; ".join(notes)


def _error(subject: Subject, problem: Problem, dense: Tensor) -> float:
    return float((subject.run(problem) - dense).norm() / dense.norm())
