"""Cache policies: what is kept of keys and values (`keep`), what a step reads of it (`read`), and how it is stored."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from saccade.catalog import Card
from saccade.mechanisms.base import require
from saccade.mechanisms.cache.forms import Forms
from saccade.mechanisms.cache.reading import WeightedSlots, attend_stored, attend_weighted
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.tiered import report
from saccade.mechanisms.cache.weights import best, received_attention
from saccade.ops import attend, block_attend, gather_attend
from saccade.ops.checks import check_qkv
from saccade.types import AttentionOutput, BlockLayout, TokenIndex

Choice = TokenIndex | BlockLayout | WeightedSlots | None
"""Slots that queries attend to; None = all, causal."""


@dataclass
class Step:
    """What a policy may know about a call beside queries and store. One for all layers of a model.

    Args:
        layer: The layer that is running, from 0.
        layers: How many there are.
        scale: Factor on q k^T in this call; None means D^-0.5.
        lse: Log-sum-exp of the rows of this call, `[B, H, M]`; None for a policy without `needs_lse`.
        picked: Left by an earlier layer of this call for the later ones.
        choosing: Bytes that the layer's policy has read only to choose what is read; `read` and `settle` add to it.
        known: Queries, and sums of attention that `received_attention` has found for them, by storage: where one call
            is shown to many policies, it is summed once. None in a model.
        softcap: The model's cap of scores in this call: `softcap * tanh(score / softcap)`; None for none.
    """

    layer: int = 0
    layers: int = 1
    scale: float | None = None
    lse: Tensor | None = None
    picked: Any = None
    choosing: int = 0
    known: tuple[Tensor, dict[Storage, Tensor]] | None = None
    softcap: float | None = None


class CachePolicy(ABC):
    """*Cache*: governs a `KVStore`. A frozen dataclass without state of its own; one policy serves all layers.

    One call appends the new tokens, attends over what `read` chooses, and then evicts what `keep` leaves out: a new
    token is attended to once before it can be evicted. Each of the three axes has a default that saves nothing.

    Attributes:
        stats: Names of numbers that the store keeps for each token (`KVStore.stat`).
        needs_lse: Whether `keep` needs `step.lse`, and with it calls whose attention was dense.
        reads_prompts: Whether prompts, too, attend through the store, unless a recipe has them sparse or rounded.
    """

    card: ClassVar[Card]
    stats: ClassVar[tuple[str, ...]] = ()
    needs_lse: ClassVar[bool] = False
    reads_prompts: ClassVar[bool] = False

    def storage(self) -> Storage:
        """*store*: how keys and values lie in memory."""
        return Storage()

    def read(self, q: Tensor, store: KVStore, step: Step) -> Choice:  # noqa: ARG002
        """*read*: slots that `q` `[B, H, M, D]`, the queries of the last M slots, attends to; nothing is lost.

        Must hide the future itself.
        """
        return None

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:  # noqa: ARG002
        """*keep*: slots to keep, bool `[B, G, n]`, as many per head as it likes; the others are gone. None = all."""
        return None

    def settle(self, q: Tensor, store: KVStore, step: Step) -> None:  # noqa: B027  most have nothing to do
        """After a call's attention, prompts included, and after `keep`: packs tokens, or notes what `read` needs."""

    def derives(self) -> Forms:
        """Forms of the tensors that `store.derived` may hold between steps, so that files can keep them too."""
        return {}

    def store(self) -> KVStore:
        """An empty store of the form this policy needs."""
        return KVStore(self.storage(), self.stats)

    def first_alike(self, layer: int) -> int:  # noqa: ARG002
        """The first layer whose steps do what this one's do, if not as much of it: keep, choose, read; mostly 0."""
        return 0


@dataclass(frozen=True)
class Everything(CachePolicy):
    """Keeps and reads everything; what it saves is what `form` saves.

    Args:
        form: How keys and values are stored.
    """

    form: Storage = Storage()  # noqa: RUF009  frozen

    def storage(self) -> Storage:
        """As given."""
        return self.form


@dataclass(frozen=True)
class Composed(CachePolicy):
    """Each axis from another policy; see `compose`."""

    keeper: CachePolicy
    reader: CachePolicy
    storer: CachePolicy

    def __post_init__(self) -> None:
        object.__setattr__(self, "stats", tuple(dict.fromkeys(self.keeper.stats + self.reader.stats)))
        object.__setattr__(self, "needs_lse", self.keeper.needs_lse)

    def storage(self) -> Storage:
        """Of `storer`."""
        return self.storer.storage()

    def read(self, q: Tensor, store: KVStore, step: Step) -> Choice:
        """Of `reader`."""
        return self.reader.read(q, store, step)

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:
        """Of `keeper`."""
        return self.keeper.keep(q, store, step)

    def settle(self, q: Tensor, store: KVStore, step: Step) -> None:
        """Of `reader`, if it selects."""
        if type(self.reader).read is not CachePolicy.read:
            self.reader.settle(q, store, step)

    def first_alike(self, layer: int) -> int:
        """The first that is alike to both `keeper` and `reader`."""
        kinds = [(self.keeper.first_alike(x), self.reader.first_alike(x)) for x in range(layer + 1)]
        return kinds.index(kinds[-1])

    def derives(self) -> Forms:
        """Of both."""
        return {**self.keeper.derives(), **self.reader.derives()}


def compose(
    keep: CachePolicy | None = None, read: CachePolicy | None = None, store: CachePolicy | Storage | None = None
) -> CachePolicy:
    """One policy of up to three: `compose(keep=SinkRecent(recent=508), store=Storage(bits=8))`.

    Args:
        keep: Says what is evicted; None for nothing.
        read: Says what a step reads; None for everything.
        store: Says how it is stored; None for floating point as it comes.

    Returns:
        The policy.

    Raises:
        ValueError: If an argument is of another kind, or `keep` needs the attention of all that `read` leaves out.
    """
    store = Everything(store) if isinstance(store, Storage) else store
    for name, policy in (("keep", keep), ("read", read), ("store", store)):
        require(policy is None or isinstance(policy, CachePolicy), name, policy, "a CachePolicy, or None")
    for name, policy in (("keep", keep), ("read", read)):
        plain = policy is None or type(policy).store is CachePolicy.store
        require(plain, name, policy, "a policy that works on any store: one whose stores have a form of their own goes "
                "alone, as `store`")  # fmt: skip
    if store is not None and type(store).store is not CachePolicy.store:
        alone = keep is None and read is None
        require(alone, "store", store, "no policy that evicts or selects beside one whose stores have a form of their "
                "own: packed as tokens age, contiguous, or in another process")  # fmt: skip
        return store
    parts = [Everything() if policy is None else policy for policy in (keep, read, store)]
    _refuse_partial_attention(parts[0], read is not None and type(read).read is not CachePolicy.read)
    return Composed(*parts)


def _refuse_partial_attention(policy: CachePolicy, selects: bool) -> None:
    if policy.needs_lse and selects:
        raise ValueError(f"{policy!r}: needs the attention of all that is kept, expected no policy that reads less")


def decode_step(
    policy: CachePolicy,
    store: KVStore,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    present: Tensor | None = None,
    step: Step | None = None,
    impl: str = "auto",
) -> tuple[Tensor, int]:
    """Prefill, a chunk of it, or one decoded token: append, attend causally, evict.

    Args:
        policy: What is read and kept.
        store: The layer's past, from `policy.store()`; changed in place.
        q: `[B, H, M, D]`, queries of the M new tokens.
        k: `[B, G, M, D]`, their keys, with positions already mixed in.
        v: `[B, G, M, E]`, their values.
        scale: Factor on q k^T; None means D^-0.5.
        present: Bool `[B, M]`, which are tokens rather than padding on the left; None for all.
        step: What the layers share; None for a layer on its own.
        impl: Implementation of the engine.

    Returns:
        Output `[B, H, M, E]`, 0 for padding, and the bytes read: stored keys and values that the attention read (each
        query head's list counted once), and what the policy read to choose them (`step.choosing`).

    Raises:
        ValueError: If shapes do not fit each other or the store, or q and k have different numbers of tokens.
        TierError: If pages could not be written to the store's tier in an earlier call, once; nothing has changed and
            nothing is lost. If some cannot be read back.
    """
    check_qkv(q, k, v)
    require(q.shape[2] == k.shape[2], "q", tuple(q.shape), f"as many tokens as k, {k.shape[2]}")
    step = Step() if step is None else step
    step.scale, step.softcap, step.choosing, first = scale, None, 0, store.empty
    report([store])
    store.append(k, v, present)
    chosen = policy.read(q.detach(), store, step)
    _refuse_partial_attention(policy, chosen is not None)
    if chosen is None and first and not policy.reads_prompts:
        segments = None if present is None else present.to(torch.int32) - 1
        out, step.lse = attend(
            q, k, v, causal=True, q_segments=segments, kv_segments=segments, scale=scale, return_lse=True, impl=impl
        )  # fmt: skip
    else:
        out, step.lse = attend_chosen(q, store, chosen, scale=scale, impl=impl)
    attended = slots_read(chosen, q, store) * store.slot_nbytes
    evict_after(policy, q.detach(), store, step)
    return out, attended + step.choosing


def attend_chosen(q: Tensor, store: KVStore, chosen: Choice, **options: Any) -> AttentionOutput:
    """Attention of the last M slots' queries over what `CachePolicy.read` chose; one query reads in place."""
    if chosen is None:
        return attend_stored(q, store, **options)
    if isinstance(chosen, WeightedSlots):
        return attend_weighted(q, store, chosen, **options)
    if isinstance(chosen, TokenIndex) and chosen.queries == 1:
        lists = max(chosen.indices.shape[1], store.lengths.shape[1])
        return attend_stored(q, store, chosen.indices[:, :, 0].expand(q.shape[0], lists, -1), **options)
    require(bool((store.lengths == len(store)).all()), "lengths", store.lengths.tolist(), "one length for this choice")
    engine: Any = block_attend if isinstance(chosen, BlockLayout) else gather_attend
    result: AttentionOutput = engine(q, store.keys, store.values, chosen, return_lse=True, **options)
    return result


def evict_after(policy: CachePolicy, q: Tensor, store: KVStore, step: Step) -> None:
    """What `keep` says, after a call's attention."""
    kept = policy.keep(q, store, step)
    if kept is not None:
        store.evict(kept)
    policy.settle(q, store, step)


def slots_read(chosen: Choice, q: Tensor, store: KVStore) -> int:
    """Slots that the engine reads, over all batch entries and heads."""
    if chosen is None:
        return store.tokens
    if isinstance(chosen, WeightedSlots):
        return int((chosen.slots >= 0).sum())
    lists = q.shape[0] * q.shape[1]
    if isinstance(chosen, BlockLayout):
        return len(chosen.indices) * chosen.block[1] * lists // (chosen.batch * chosen.heads)
    if chosen.queries == 1 and chosen.indices.shape[1] < q.shape[1]:
        lists = store.lengths.numel()  # heads that share keys share a list, and read it once
    return int((chosen.indices >= 0).sum()) * lists // (chosen.indices.shape[0] * chosen.indices.shape[1])


__all__ = [
    "CachePolicy", "Choice", "Composed", "Everything", "Step", "attend_chosen", "best", "compose", "decode_step",
    "evict_after", "received_attention", "slots_read",
]  # fmt: skip
