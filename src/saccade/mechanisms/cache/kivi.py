"""KIVI: keys quantised per channel, values per token, the recent tokens in full precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._packed import PackedStore, Packing
from saccade.mechanisms.cache.base import CachePolicy, Step
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern


@register(
    "kivi",
    Kind.CACHE_POLICY,
    summary="Stores all but the recent tokens in 2 or 4 bits, keys by channel and values by token.",
    other_papers=("KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",),
    year=2024,
    code="jy-yuan/KIVI",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="recent >= N",
    complexity="N",
    effects=frozenset({"packing"}),
    deviations=(
        (
            "A token's key and value leave the window together, once `group` tokens beyond `recent` are there, so that "
            "recent .. recent + group - 1 are in full precision. The authors pack all keys of the window when it is "
            "full, and values one at a time."
        ),
        (
            "A prompt attends in full precision and is packed afterwards, as the authors' is; the second chunk of a "
            "prompt in chunks reads packed tokens, so that chunks and steps differ from the whole."
        ),
        "Does not compose with policies that evict or select.",
    ),
    example={"bits": 2, "group": 4, "recent": 8, "channels": None},
    exact=lambda n: {"recent": n, "channels": None},
    ladder=lambda n: tuple(
        {"bits": bits, "group": 8, "recent": max(n // part, 1), "channels": None}
        for bits, part in ((2, 16), (2, 4), (4, 4), (8, 2))
    ),
    at_budget=lambda b: (
        None if b.part < 0.25 else {"bits": 2, "recent": 32} if b.part < 0.4 else {"bits": 4, "recent": 128}
    ),
)
@dataclass(frozen=True)
class Kivi(CachePolicy):
    """Of n tokens the oldest `floor((n - recent) / group) * group` are in codes: low + scale * code.

    Each key channel has its own scale and low in each group of tokens, as some channels are large in all tokens; each
    value has one for every `channels` of its own. Nothing is evicted and everything is read.

    Args:
        bits: Of a code: 2, 4 or 8.
        group: Tokens whose key channels share a scale.
        recent: Last tokens that stay as they are, at least.
        channels: Channels of a value that share a scale; None for all.
    """

    bits: int = 2
    group: int = 32
    recent: int = 128
    channels: int | None = 32

    def __post_init__(self) -> None:
        require(self.bits in (2, 4, 8), "bits", self.bits, "2, 4 or 8")
        require(self.group >= 1, "group", self.group, "at least 1 token")
        require(self.recent >= 0, "recent", self.recent, "at least 0 tokens")
        require(self.channels is None or self.channels >= 1, "channels", self.channels, "at least 1 channel, or None")

    def storage(self) -> Storage:
        """Of the recent tokens: as they come, in pages of a group."""
        return Storage(page=self.group)

    def store(self) -> PackedStore:
        """With one kind of packed groups."""
        return PackedStore(self.storage(), [Packing(self.bits, self.group, self.channels)])

    def settle(self, q: Tensor, store: KVStore, step: Step) -> None:  # noqa: ARG002
        """Pack the oldest whole groups that are not recent."""
        beyond = (store.lengths - self.recent).clamp(min=0)
        count = torch.div(beyond, self.group, rounding_mode="floor") * self.group
        if not isinstance(store, PackedStore) or not bool(count.any()):
            return
        store.sort()
        slot = torch.arange(len(store), device=count.device)
        store.pack([slot < count[..., None]])
