"""Cache policies: what is kept of keys and values (`keep`), what a step reads of it (`read`), and how (`store`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from saccade.catalog import Card
from saccade.mechanisms.base import require
from saccade.mechanisms.cache.store import KVStore
from saccade.ops import attend, block_attend, gather_attend
from saccade.ops.checks import accumulation_dtype, check_qkv, resolve_scale
from saccade.types import AttentionOutput, BlockLayout, TokenIndex

SCORE_ELEMENTS = 2**22
"""Most scores that `received_attention` holds at once."""


@dataclass
class Step:
    """What the layers of one model share while one call passes through them, from the first to the last.

    Args:
        layer: The layer that is running.
        picked: Slots that an earlier layer of this call chose for the later ones, `[B, H, M, K]`, or None.
    """

    layer: int = 0
    picked: TokenIndex | None = None


class CachePolicy(ABC):
    """*Cache*: governs a `KVStore`. A frozen dataclass without state of its own; one policy serves all layers.

    One call appends the new tokens, attends over what `read` selects, and then evicts what `keep` leaves out, so a new
    token is always attended to once before it can be evicted. See `decode_step`.
    """

    card: ClassVar[Card]

    def store(self) -> KVStore:
        """An empty store of the form this policy needs."""
        return KVStore()

    def read(self, q: Tensor, store: KVStore, step: Step) -> TokenIndex | BlockLayout | None:  # noqa: ARG002
        """Slots that `q` `[B, H, M, D]`, the queries of the last M slots, attends to; nothing is lost.

        Must hide the future itself. `step` carries choices from layer to layer. None = all, causal.
        """
        return None

    @abstractmethod
    def keep(self, store: KVStore) -> Tensor | None:
        """Slots to keep, int64 `[B, G, m]` ascending; the others are gone for good. None = all."""


def decode_step(
    policy: CachePolicy,
    store: KVStore,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    step: Step | None = None,
    impl: str = "auto",
) -> tuple[Tensor, int]:
    """Prefill, a chunk of it, or one decoded token: append, attend causally, account, evict.

    Args:
        policy: What is read and kept.
        store: The layer's past, from `policy.store()`; changed in place.
        q: `[B, H, M, D]`, queries of the M new tokens.
        k: `[B, G, M, D]`, their keys, with positions already mixed in.
        v: `[B, G, M, E]`, their values.
        scale: Factor on q k^T; None means D^-0.5.
        step: What the layers share; None for a layer on its own.
        impl: Implementation of the engine.

    Returns:
        Output `[B, H, M, E]`, and the bytes of stored keys and values the attention read (each query head's list
        counted once; scores computed only to select are not counted).

    Raises:
        ValueError: If shapes do not fit each other or the store, or q and k have different numbers of tokens.
    """
    check_qkv(q, k, v)
    require(q.shape[2] == k.shape[2], "q", tuple(q.shape), f"as many tokens as k, {k.shape[2]}")
    keys, values = store.append(k, v)
    chosen = policy.read(q.detach(), store, Step() if step is None else step)
    if chosen is not None and store.track_attention:
        raise ValueError(f"{policy!r}: read selects and attention is tracked, expected at most one of the two")
    result = _attend(q, keys, values, chosen, return_lse=store.track_attention, scale=scale, impl=impl)
    slots_read = _slots_read(chosen, q, keys)
    if isinstance(result, AttentionOutput):
        out, lse = result
        store.add_attention(received_attention(q, keys, lse, scale))  # type: ignore[arg-type]
    else:
        out = result
    kept = policy.keep(store)
    if kept is not None:
        store.evict(kept)
    return out, slots_read * store.slot_nbytes


def _attend(q: Tensor, k: Tensor, v: Tensor, chosen: TokenIndex | BlockLayout | None, **options: Any) -> Any:
    """The engine for what was chosen."""
    if chosen is None:
        return attend(q, k, v, causal=True, **options)
    engine: Any = block_attend if isinstance(chosen, BlockLayout) else gather_attend
    return engine(q, k, v, chosen, **options)


def _slots_read(chosen: TokenIndex | BlockLayout | None, q: Tensor, keys: Tensor) -> int:
    """Slots that the engine gathers, over all batch entries and heads."""
    if chosen is None:
        return math.prod(keys.shape[:3])
    lists = q.shape[0] * q.shape[1]
    if isinstance(chosen, BlockLayout):
        return len(chosen.indices) * chosen.block[1] * lists // (chosen.batch * chosen.heads)
    return int((chosen.indices >= 0).sum()) * lists // (chosen.indices.shape[0] * chosen.indices.shape[1])


@torch.no_grad()
def received_attention(q: Tensor, k: Tensor, lse: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention that each key receives, summed over all queries and the query heads that share it.

    Args:
        q: `[B, H, M, D]`.
        k: `[B, G, n, D]`; causal, the queries are those of the last M keys.
        lse: Log-sum-exp `[B, H, M]` of the rows.
        scale: Factor on q k^T; None means D^-0.5.

    Returns:
        `[B, G, n]` in fp32 (fp64 for fp64), computed in bounded chunks of queries.
    """
    batch, heads, queries, dim = q.shape
    groups, slots = k.shape[1], k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    wide = q.view(batch, groups, heads // groups, queries, dim).to(dtype) * resolve_scale(scale, dim)
    rows = lse.view(batch, groups, heads // groups, queries, 1).to(dtype)
    keys = k.to(dtype)[:, :, None].transpose(-1, -2)
    slot = torch.arange(slots, device=q.device)
    total = torch.zeros(batch, groups, slots, dtype=dtype, device=q.device)
    size = max(1, SCORE_ELEMENTS // max(1, batch * heads * slots))
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        weights = torch.exp(wide[..., start:stop, :] @ keys - rows[..., start:stop, :])
        last = torch.arange(start, stop, device=q.device)[:, None] + slots - queries
        total += weights.masked_fill(slot > last, 0.0).sum((2, 3))
    return total


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
        step = Step()
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

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str = "auto") -> Tensor:
        """Attention of the new tokens over themselves and what is kept: `[B, H, M, E]`; see `decode_step`."""
        if self.layer <= self.step.layer:
            self.step.picked = None
        self.step.layer = self.layer
        out, self.bytes_read = decode_step(self.policy, self.kept, q, k, v, scale, step=self.step, impl=impl)
        return out
