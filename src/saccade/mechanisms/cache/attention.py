"""CachedAttention: one layer's attention with a governed cache."""

from __future__ import annotations

from torch import Tensor

from saccade.mechanisms.base import require
from saccade.mechanisms.cache.base import CachePolicy, Step, decode_step


class CachedAttention:
    """One layer's attention with a governed cache: call it with the new tokens, whole, in chunks or one by one.

    Args:
        policy: What is kept and read.
        layer: Which layer this is, from 0; only policies that share choices between layers care.
        step: Shared with the other layers; see `stack`.

    Attributes:
        kept: The `KVStore`.
        bytes_read: What the attention of the last call read, see `decode_step`.
    """

    def __init__(self, policy: CachePolicy, layer: int = 0, step: Step | None = None) -> None:
        require(layer >= 0, "layer", layer, "at least 0")
        self.policy = policy
        self.layer = layer
        self.step = Step() if step is None else step
        self.reset()

    @classmethod
    def stack(cls, policy: CachePolicy, layers: int) -> list[CachedAttention]:
        """One for each of a model's layers, sharing one `Step`; call them in order."""
        step = Step(layers=layers)
        return [cls(policy, layer, step) for layer in range(layers)]

    def reset(self) -> None:
        """Forget everything, for a new sequence."""
        self.kept = self.policy.store()
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


__all__ = ["CachedAttention"]
