"""The laws for reducers, which make fewer tokens of many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.laws.base import (
    NotApplicable,
    counted_work,
    deterministic,
    expect,
    expect_close,
    expect_equal,
    expect_falling,
    expect_growth,
    expect_refusal,
    make_problem,
    poisoned_empty,
)  # fmt: skip
from saccade.laws.numeric import expect_gradcheck, expect_stable
from saccade.laws.settings import refuse_settings
from saccade.laws.subjects import Subject
from saccade.laws.system import expect_compiles
from saccade.mechanisms.base import Reduced


def tokens_of(subject: Subject, tokens: int = 48, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded tokens `[2, N, 12]` whose neighbours resemble each other."""
    problem = make_problem(queries=tokens, heads=1, groups=1, dim=12, dtype=dtype, device=subject.device)
    return problem.q[:, 0]


def agreement(subject: Subject) -> str:
    """1. The fp32 error is that of inputs off by a rounding."""
    return expect_stable(
        lambda x: subject.mechanism.reduce(x).tokens, [tokens_of(subject, dtype=torch.float64)], ["dx"]
    )


def gradient_check(subject: Subject) -> str:
    """2. `gradcheck` in fp64; the choice does not change within its steps."""
    subject.require("backward")
    leaf = tokens_of(subject, 16, torch.float64).requires_grad_()
    expect_gradcheck(lambda x: subject.mechanism.reduce(x).tokens, (leaf,))
    return ""


def budgets(subject: Subject) -> str:
    """6. The map back is one; a full budget keeps every token; what is lost falls as the budget grows."""
    x = tokens_of(subject)
    _expect_map(subject.mechanism.reduce(x), x)
    notes, card = ["the map back fits"], subject.card
    if card.exact is not None:
        full = Subject(card, subject.device, card.exact(x.shape[1])).mechanism.reduce(x)
        expect_equal(full.tokens, x, "at full budget the tokens")
        notes.append(f"all kept at {card.exact_when}")
    if card.ladder is not None:
        rungs = [Subject(card, subject.device, s).mechanism.reduce(x) for s in card.ladder(x.shape[1])]
        counts = [rung.tokens.shape[1] for rung in rungs]
        expect(counts == sorted(counts), f"tokens kept fall along the ladder: {counts}")
        errors = [float((rung.restore(rung.tokens) - x).norm() / x.norm()) for rung in rungs]
        notes.append(expect_falling(errors))
    return "; ".join(notes)


def _expect_map(reduced: Reduced, x: Tensor) -> None:
    """`kept` ascends within the input, `assignment` points at rows, and every kept token stands for itself."""
    rows = reduced.tokens.shape[1]
    expect(reduced.kept.shape == (x.shape[0], rows), f"kept has shape {tuple(reduced.kept.shape)} for {rows} tokens")
    expect(bool((reduced.kept.diff(dim=1) > 0).all()), "kept does not ascend")
    expect(reduced.assignment.shape == x.shape[:2], f"assignment has shape {tuple(reduced.assignment.shape)}")
    inside = bool(((reduced.assignment >= 0) & (reduced.assignment < rows)).all())
    expect(inside, f"assignment points outside the {rows} tokens kept")
    own = reduced.assignment.gather(1, reduced.kept)
    expect_equal(own, torch.arange(rows, device=own.device).expand_as(own), "the row that stands for a kept token")
    expect(reduced.restore(reduced.tokens).shape == x.shape, "restored tokens have another shape")


def independence(subject: Subject) -> str:
    """7. An item does not feel its batch."""
    x = tokens_of(subject)
    whole, alone = subject.mechanism.reduce(x), subject.mechanism.reduce(x[1:])
    expect_close(alone.tokens, whole.tokens[1:], "an item alone and in its batch")
    expect_equal(alone.assignment, whole.assignment[1:], "the map of an item alone and in its batch")
    return "batch"


def everything_written(subject: Subject) -> str:
    """9. Every element is written."""
    x = tokens_of(subject)
    clean = subject.mechanism.reduce(x)
    with poisoned_empty():
        got = subject.mechanism.reduce(x)
    for name in ("tokens", "kept", "assignment"):
        expect_equal(getattr(got, name), getattr(clean, name), f"{name} with poisoned memory")
    return ""


def refusals(subject: Subject) -> str:
    """10. Wrong shapes and settings are refused by name."""
    x, reduce = tokens_of(subject), subject.mechanism.reduce
    done = [
        expect_refusal(lambda: reduce(x[0]), "tokens", "2-D tokens"),
        expect_refusal(lambda: reduce(x, x[:, :-1]), "keys", "keys of another length"),
    ]

    def smoke(settings: dict[str, Any]) -> None:
        Subject(subject.card, subject.device, settings).mechanism.reduce(x)

    return ", ".join([*done, refuse_settings(subject.card, smoke)])


def compilation(subject: Subject) -> str:
    """11. `torch.compile(fullgraph=True)` traces it."""
    return expect_compiles(lambda x: subject.mechanism.reduce(x).tokens, [(tokens_of(subject),)])


def determinism(subject: Subject) -> str:
    """12. The same call gives the same bits, gradients included."""
    x = tokens_of(subject).requires_grad_()
    with deterministic():
        first, second = (subject.mechanism.reduce(x) for _ in range(2))
        expect_equal(second.tokens, first.tokens, "two runs")
        expect_equal(second.assignment, first.assignment, "the maps of two runs")
        if not subject.can_backward:
            return "forward"
        one, other = (torch.autograd.grad(r.tokens.square().sum(), x)[0] for r in (first, second))
    expect_equal(other, one, "the gradients of two runs")
    return "forward and backward"


def complexity(subject: Subject) -> str:
    """13. Counted work at N and 2N grows as declared (comparisons of a sort do not count)."""
    if not subject.card.complexity:
        raise NotApplicable("the card states no complexity")
    small, large = (counted_work(lambda: subject.mechanism.reduce(tokens_of(subject, n))) for n in (1024, 2048))  # noqa: B023
    return expect_growth(subject.card.complexity, small, large, "N=1024 to 2048")


CHECKS = {
    1: agreement, 2: gradient_check, 6: budgets, 7: independence, 9: everything_written, 10: refusals,
    11: compilation, 12: determinism, 13: complexity,
}  # fmt: skip

REASONS = {
    3: "a reducer's inputs carry no padding",
    4: "a reducer looks at a set of tokens, which has no past and future",
    5: "a reducer needs all tokens at once",
    8: "a reducer computes no offsets: torch gathers rows by int64 places",
    14: "recipes choose attention; a reducer changes the tokens between layers",
    15: "not defined over shards of a sequence",
}
