"""KeyDiff: keep the keys that differ most from the mean key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache.base import CachePolicy, Step, best
from saccade.mechanisms.cache.store import KVStore
from saccade.ops.checks import accumulation_dtype
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
    cosine with a key.

    Args:
        tokens: Kept, per key/value head.
    """

    tokens: int = 2048

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1 token")

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:  # noqa: ARG002
        """The most distinctive keys."""
        if len(store) <= self.tokens:
            return None
        keys = store.keys
        directions = normalize(keys.to(accumulation_dtype(keys.dtype)), dim=-1)  # 0 where there is no token
        anchor = normalize(directions.sum(2), dim=-1)
        likeness = (directions @ anchor[..., None])[..., 0]
        return best((-likeness).masked_fill(~store.present, -torch.inf), self.tokens)
