"""StreamingLLM's cache: the first tokens, which hold attention sinks, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache.base import CachePolicy, Step
from saccade.mechanisms.cache.store import KVStore
from saccade.types import BlockLayout, Geometry, Kind, Pattern

BLOCK = 64
"""Block size, in tokens, of the layout that a chunk of several queries reads."""


@register(
    "sink_recent",
    Kind.CACHE_POLICY,
    summary="Evicts all but the first tokens and a sliding window.",
    other_papers=("Efficient Streaming Language Models with Attention Sinks",),
    year=2023,
    code="mit-han-lab/streaming-llm",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa", "streaming"}),
    training_free=True,
    exact_when="recent >= N",
    complexity="N",
    effects=frozenset({"evicting"}),
    deviations=(
        (
            "Keys are kept as they are given, with text positions. The paper numbers the kept tokens 0, 1, 2, ... "
            "anew, which lets a stream outgrow the trained context: for that, keys would be rotated when read."
        ),
        (
            "Prefill reads sinks and window too, where the authors' code prefills densely, so that a prompt gives the "
            "same output whole, in chunks and token by token. Calls with several tokens take sequences of one length; "
            "a `PagedCache` prefills by its recipe and takes padded ones."
        ),
    ),
    example={"sinks": 3, "recent": 13},
    exact=lambda n: {"sinks": 0, "recent": n},
    ladder=lambda n: tuple({"sinks": min(4, n), "recent": max(n // part, 1)} for part in (16, 8, 4, 2)),
    at_budget=lambda b: {"sinks": 4, "recent": b.count - 4},
)
@dataclass(frozen=True)
class SinkRecent(CachePolicy):
    """Query i sees tokens 0 .. sinks - 1 and i - recent + 1 .. i; what no later query can see is evicted.

    At rest `sinks + recent - 1` tokens are kept: the next token is the last of its own window.

    Args:
        sinks: First tokens that stay.
        recent: Window in tokens, the query's own included.
    """

    sinks: int = 4
    recent: int = 1020

    def __post_init__(self) -> None:
        require(self.sinks >= 0, "sinks", self.sinks, "at least 0 tokens")
        require(self.recent >= 1, "recent", self.recent, "at least 1 token")

    def read(self, q: Tensor, store: KVStore, step: Step) -> BlockLayout | None:  # noqa: ARG002
        """Sinks and each query's own window; slots past the sinks are consecutive tokens, so slots stand for places."""
        queries, slots = q.shape[2], len(store)
        if slots <= self.recent or (queries <= 1 and slots <= self.sinks + self.recent):
            return None
        window = BlockLayout.window(queries, slots, self.recent - 1, 0, block=BLOCK, device=q.device)
        first = torch.arange(min(self.sinks, slots), device=q.device)
        sinks = BlockLayout.tokens(queries, slots, key_tokens=first, block=BLOCK, device=q.device)
        return (window | sinks).within(Geometry(causal=True))

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:  # noqa: ARG002
        """The first and the last tokens."""
        if len(store) < self.sinks + self.recent:
            return None
        positions = store.positions
        return (positions < self.sinks) | (positions > store.seen[:, None, None] - self.recent)
