"""DART against sets and loops, one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.reduce.dart import DART

pytestmark = pytest.mark.quick


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def oracle(tokens: Tensor, keys: Tensor, budget: float, pivots: int) -> tuple[list[int], list[int]]:
    """Kept places of one sequence `[N, C]`, and for each token the place of the token that stands for it."""
    total = tokens.shape[0]
    kept_count = max(1, round(budget * total))
    order = sorted(range(total), key=lambda j: -float(keys[j].abs().sum()))
    chosen_pivots = order[: min(pivots, kept_count)]
    kept, left = set(chosen_pivots), set(range(total)) - set(chosen_pivots)
    share, extra = divmod(kept_count - len(chosen_pivots), len(chosen_pivots))
    for number, pivot in enumerate(chosen_pivots):
        ranked = sorted(left, key=lambda j: cosine(tokens[j], tokens[pivot]))
        taken = ranked[: share + 1 if number < extra else share]
        kept |= set(taken)
        left -= set(taken)
    owner = [j if j in kept else max(chosen_pivots, key=lambda p: cosine(tokens[j], tokens[p])) for j in range(total)]
    return sorted(kept), owner


@pytest.mark.parametrize(
    ("count", "budget", "pivots"), [(17, 0.5, 3), (23, 0.3, 4), (9, 0.2, 8), (12, 1.0, 5), (7, 0.01, 2), (1, 0.5, 1)]
)
@pytest.mark.parametrize("with_keys", [True, False])
def test_matches_the_oracle(count: int, budget: float, pivots: int, with_keys: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randn(3, count, 6, generator=generator, dtype=torch.float64)
    keys = torch.randn(3, count, 4, generator=generator, dtype=torch.float64) if with_keys else None
    reduced = DART(budget=budget, pivots=pivots).reduce(tokens, keys)
    for b in range(3):
        kept, owner = oracle(tokens[b], tokens[b] if keys is None else keys[b], budget, pivots)
        assert reduced.kept[b].tolist() == kept
        assert torch.equal(reduced.tokens[b], tokens[b, kept])
        assert torch.equal(reduced.restore(reduced.tokens)[b], tokens[b, owner])


def test_full_budget_changes_nothing() -> None:
    tokens = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(0))
    reduced = DART(**DART.card.exact(10)).reduce(tokens)
    assert torch.equal(reduced.tokens, tokens)
    assert torch.equal(reduced.assignment, torch.arange(10).expand(2, 10))


def test_by_hand() -> None:
    """Token 2 is the pivot; 0 duplicates it, 3 is opposite and 1 orthogonal: 2, 3 and then 1 are kept."""
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 0.0], [-1.0, 0.0]]])
    reduced = DART(budget=0.75, pivots=1).reduce(tokens)
    assert reduced.kept.tolist() == [[1, 2, 3]]
    assert reduced.assignment.tolist() == [[1, 0, 1, 2]]


def test_gradient_goes_to_the_kept_tokens() -> None:
    tokens = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    reduced = DART(budget=0.5, pivots=2).reduce(tokens)
    reduced.tokens.sum().backward()
    expected = torch.zeros(1, 8, 3)
    expected[0, reduced.kept[0]] = 1.0
    assert torch.equal(tokens.grad, expected)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"budget=0: expected a fraction kept, in \(0, 1\]"):
        DART(budget=0)
    with pytest.raises(ValueError, match=r"budget=1.5: expected a fraction kept"):
        DART(budget=1.5)
    with pytest.raises(ValueError, match="pivots=0: expected at least 1 token"):
        DART(pivots=0)
    with pytest.raises(ValueError, match=r"tokens.shape=\(4, 3\): expected \[B, N, C\]"):
        DART().reduce(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"keys.shape=\(1, 5, 2\): expected \[1, 4, C'\]"):
        DART().reduce(torch.zeros(1, 4, 3), torch.zeros(1, 5, 2))
