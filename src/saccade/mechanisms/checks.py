"""What mechanisms refuse: bad hyperparameters, and problems they are not defined for."""

from __future__ import annotations

from torch import Tensor

from saccade.catalog import Card
from saccade.types import Geometry, Pattern


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise the library's one form of error for a bad hyperparameter.

    Args:
        condition: What must hold.
        name: Hyperparameter.
        value: What it is.
        expected: What it should be, in words.

    Raises:
        ValueError: `name=value: expected ...`, unless `condition` holds.
    """
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def require_pattern(card: Card, q: Tensor, k: Tensor, geometry: Geometry) -> None:
    """Refuse a pattern or a grid the mechanism is not defined for.

    Args:
        card: Of the mechanism.
        q: `[B, H, M, D]`.
        k: `[B, G, N, D]`.
        geometry: Causality and segments.

    Raises:
        ValueError: Naming the pattern and those of the card, or the sizes that are not those of a whole prompt.
    """
    causal = (Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS) if geometry.causal else ()
    noncausal = () if geometry.causal else (Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS)
    possible = set(causal + noncausal)
    if q.shape[2] > k.shape[2]:
        possible -= {Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF}
    elif q.shape[2] < k.shape[2] and not geometry.causal:
        possible -= {Pattern.NONCAUSAL_SELF}  # causal with fewer queries is self-attention over a cache
    if not possible & card.patterns:
        raise ValueError(
            f"causal={geometry.causal} with {q.shape[2]} queries and {k.shape[2]} keys: "
            f"{card.name} is defined for {', '.join(sorted(card.patterns))}"
        )
    if card.prefill_only and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} queries and {k.shape[2]} keys: expected as many, {card.name} is for prefill only: "
            f"{card.prefill_only}"
        )
    if geometry.q_segments is not None and "segments" not in card.supports:
        raise ValueError(f"q_segments: {card.name} does not support packed sequences or padding")
