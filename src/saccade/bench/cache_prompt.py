"""A prompt that is read once for all cache policies: they differ in what they keep of it, not in how it was read.

Prefill with a `PagedCache` is what the recipe says, dense here, whatever the policy; the policy then looks at queries,
keys, values and the log-sum-exp of each layer. These are recorded in one pass and handed to every policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from saccade.mechanisms.cache.base import CachePolicy, Choice, Step, evict_after, slots_read
from saccade.mechanisms.cache.reading import WeightedSlots
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.types import TokenIndex


@dataclass(frozen=True)
class Past:
    """What a layer computed for a prompt.

    Args:
        q: `[B, H, n, D]`.
        k: `[B, G, n, D]`.
        v: `[B, G, n, E]`.
        lse: `[B, H, n]`.
        scale: Factor on q k^T.
        known: What policies have summed over the first so many tokens and sequences, see `Step.known`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    scale: float | None
    known: dict[tuple[int | None, int | None], tuple[Tensor, dict[Storage, Tensor]]] = field(default_factory=dict)


class Recorder(CachePolicy):
    """Keeps everything, and remembers what it was shown."""

    needs_lse: ClassVar[bool] = True

    def __init__(self) -> None:
        self.layers: list[Past] = []

    def keep(self, q: Tensor, store: KVStore, step: Step) -> None:
        """Remember."""
        if step.lse is None:
            raise ValueError("step.lse=None: expected the log-sum-exp of dense attention")
        self.layers.append(Past(q, store.keys, store.values, step.lse, step.scale))


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model read it.

    Args:
        layers: Of the model.
        logits: After the last token, `[B, V]`.
    """

    layers: list[Past]
    logits: Tensor

    @property
    def token_nbytes(self) -> int:
        """Bytes of keys and values of a token, in all layers and sequences."""
        return sum((x.k.nbytes + x.v.nbytes) // x.k.shape[2] for x in self.layers)

    def fill(self, cache: Any, tokens: int | None = None, sequences: int | None = None) -> None:
        """What the cache would hold if it had been there when the prompt was read.

        Args:
            cache: An empty `PagedCache` or `DynamicCache`.
            tokens: Of the prompt, the first so many; None for all.
            sequences: Likewise.
        """
        for number, past in enumerate(self.layers):
            k, v, lse = (x[:sequences, :, :tokens] for x in (past.k, past.v, past.lse))
            if not hasattr(cache, "step"):
                cache.update(k.clone(), v.clone(), number)
                continue
            layer, step = cache.layers[number], cache.step
            step.layer, step.scale, step.choosing = number, past.scale, 0
            step.lse = lse if layer.policy.needs_lse else None
            step.known = past.known.setdefault((tokens, sequences), (past.q[:sequences, :, :tokens], {}))
            layer.store.append(k, v, None)
            layer.length += k.shape[2]
            evict_after(layer.policy, step.known[0], layer.store, step)
            step.known = None


@torch.no_grad()
def read_prompt(model: Any, ids: Tensor) -> Prompt:
    """Read it once.

    Args:
        model: A transformers causal language model with a dense recipe applied.
        ids: int64 `[B, n]`.

    Returns:
        What its layers computed.
    """
    from saccade.plug import PagedCache

    recorder = Recorder()
    out = model(input_ids=ids.to(model.device), past_key_values=PagedCache(model, recorder), logits_to_keep=1)
    return Prompt(recorder.layers, out.logits[:, -1])


class Counted(CachePolicy):
    """A policy whose reading is counted.

    Args:
        policy: The policy.

    Attributes:
        nbytes: Bytes of stored keys and values that attention has read so far, and of what was read to choose them. A
            token that several query heads of a key/value head list is read once.
    """

    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.nbytes = 0
        object.__setattr__(self, "stats", policy.stats)
        object.__setattr__(self, "needs_lse", policy.needs_lse)

    def storage(self) -> Storage:
        """Of the policy."""
        return self.policy.storage()

    def store(self) -> KVStore:
        """Of the policy."""
        return self.policy.store()

    def read(self, q: Tensor, store: KVStore, step: Step) -> Choice:
        """Of the policy, counted."""
        before = step.choosing
        chosen = self.policy.read(q, store, step)
        self.nbytes += distinct(chosen, q, store) * store.slot_nbytes + step.choosing - before
        return chosen

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:
        """Of the policy."""
        return self.policy.keep(q, store, step)

    def settle(self, q: Tensor, store: KVStore, step: Step) -> None:
        """Of the policy, counted."""
        before = step.choosing
        self.policy.settle(q, store, step)
        self.nbytes += step.choosing - before


def distinct(chosen: Choice, q: Tensor, store: KVStore) -> int:
    """Slots that one query per head reads: those that several query heads of a key/value head list count once."""
    if isinstance(chosen, TokenIndex) and chosen.queries == 1:
        slots = chosen.indices[:, :, 0]
    elif isinstance(chosen, WeightedSlots):
        slots = chosen.slots
    else:
        return slots_read(chosen, q, store)
    batch, heads = store.lengths.shape
    slots = slots.expand(batch, max(slots.shape[1], heads), -1).reshape(batch, heads, -1)
    listed = torch.zeros(batch, heads, len(store) + 1, dtype=torch.bool, device=slots.device)
    listed.scatter_(2, slots + 1, value=True)  # -1, an empty place, falls on the first
    return int(listed[..., 1:].sum())


__all__ = ["Counted", "Past", "Prompt", "Recorder", "distinct", "read_prompt"]
