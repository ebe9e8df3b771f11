"""CachedAttention: one layer's attention with a governed cache."""

from __future__ import annotations

from torch import Tensor

from saccade.mechanisms.base import require
from saccade.mechanisms.cache.base import CachePolicy, Step, decode_step
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.tiered import TieredStore, fetch_ahead
from saccade.mechanisms.cache.tiers import Tier


class CachedAttention:
    """One layer's attention with a governed cache: call it with the new tokens, whole, in chunks or one by one.

    Args:
        policy: What is kept and read.
        layer: Which layer this is, from 0; only policies that share choices between layers care.
        step: Shared with the other layers; see `stack`.
        tier: Where pages live that are not read, None for memory.

    Attributes:
        kept: The `KVStore`.
        bytes_read: What the attention of the last call read, see `decode_step`.
    """

    def __init__(self, policy: CachePolicy, layer: int = 0, step: Step | None = None, tier: Tier | None = None) -> None:
        require(layer >= 0, "layer", layer, "at least 0")
        self.policy = policy
        self.layer = layer
        self.tier = tier
        self.step = Step() if step is None else step
        self.reset()

    @classmethod
    def stack(cls, policy: CachePolicy, layers: int, tier: Tier | None = None) -> list[CachedAttention]:
        """One for each of a model's layers, sharing one `Step`; call them in order."""
        step = Step(layers=layers)
        stack = [cls(policy, layer, step, tier) for layer in range(layers)]
        fetch_ahead([layer.kept for layer in stack])
        return stack

    def reset(self) -> None:
        """Forget everything, for a new sequence."""
        self.kept = make_store(self.policy, self.tier)
        self.bytes_read = 0
        self.step.picked = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory the cache holds."""
        return self.kept.nbytes

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, present: Tensor | None = None, scale: float | None = None,
        impl: str = "auto",
    ) -> Tensor:  # fmt: skip
        """Attention of the new tokens over themselves and what is kept: `[B, H, M, E]`; see `decode_step`."""
        if self.layer <= self.step.layer:
            self.step.picked = None
        self.step.layer = self.layer
        out, self.bytes_read = decode_step(
            self.policy, self.kept, q, k, v, scale, present=present, step=self.step, impl=impl
        )  # fmt: skip
        return out


def make_store(policy: CachePolicy, tier: Tier | None) -> KVStore:
    """An empty store of the form that the policy needs, with a second tier if one is given.

    Args:
        policy: The policy.
        tier: None for memory alone.

    Returns:
        The store.

    Raises:
        ValueError: If there is a tier, and the policy has stores of a form of its own.
    """
    if tier is None:
        return policy.store()
    plain = type(policy.store()) is KVStore
    require(plain, "tier", tier, f"None: {policy!r} has a store of its own form, which has no second tier")
    return TieredStore(tier, policy.storage(), policy.stats)


__all__ = ["CachedAttention", "make_store"]
