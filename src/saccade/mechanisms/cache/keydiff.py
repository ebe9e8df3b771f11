"""KeyDiff: keep the keys that differ most from the mean key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._keys import (
    ANCHOR_FORMS,
    LEAST,
    NORM,
    directions_left,
    key_norms,
    key_products,
    sum_of_directions,
)
from saccade.mechanisms.cache.base import CachePolicy, Step, best
from saccade.mechanisms.cache.forms import Forms
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern


@register(
    "keydiff",
    Kind.CACHE_POLICY,
    summary="Evicts the tokens whose keys point where the mean key points; needs no attention weights.",
    other_papers=(
        (
            "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained "
            "Environments"
        ),
    ),
    year=2025,
    code="",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"evicting"}),
    deviations=(
        (
            "Evicts after each call: the paper's blocks of a prompt are the calls it is fed in, so that a prompt in "
            "other blocks, or whole, keeps other tokens. That is the paper's rule."
        ),
        "The paper's variant with a sliding window is left out; its details were not at hand.",
    ),
    example={"tokens": 16},
    exact=lambda n: {"tokens": n},
    ladder=lambda n: tuple({"tokens": max(n // part, 1)} for part in (16, 8, 4, 2)),
    at_budget=lambda b: {"tokens": b.count},
)
@dataclass(frozen=True)
class KeyDiff(CachePolicy):
    """After each call keep, per key/value head, the `tokens` least similar to the anchor; ties: the earlier token.

    The anchor is the mean of the directions of all keys in the cache, `mu = mean_j k_j / ||k_j||`, and similarity its
    cosine with a key. Keys' lengths and the sum of directions are kept between steps: a step reads its new keys, those
    it evicts, and each key once, in place, for its product with the anchor.

    Args:
        tokens: Kept, per key/value head.
    """

    tokens: int = 2048
    stats: ClassVar[tuple[str, ...]] = (NORM,)

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1 token")

    def derives(self) -> Forms:
        """The sum of directions of what was kept."""
        return ANCHOR_FORMS

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:  # noqa: ARG002
        """The most distinctive keys."""
        if len(store) <= self.tokens:
            return None
        norms = key_norms(store)
        total = sum_of_directions(store, norms)
        likeness = key_products(normalize(total, dim=-1), store) / norms.clamp(min=LEAST)
        kept = best((-likeness).masked_fill(~store.present, -torch.inf), self.tokens)
        directions_left(store, norms, total, kept)
        return kept
