"""Sink + sliding window: the last `window` tokens and the first `sinks` tokens (StreamingLLM's pattern)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Selector, require
from saccade.mechanisms.where._static import first_tokens
from saccade.types import BlockLayout, Geometry, Kind


@register(
    "sink_window",
    Kind.SELECTOR,
    summary="The first tokens, which hold attention sinks, and a sliding window.",
    other_papers=("Efficient Streaming Language Models with Attention Sinks",),
    year=2023,
    code="mit-han-lab/streaming-llm",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse", "segments", "streaming"}),
    training_free=True,
    exact_when="window >= N",
    complexity="N",
    deviations=(
        "Positions stay those of the text; StreamingLLM renumbers them within its cache.",
        "Nothing is evicted: this chooses the pairs that are computed, on whatever keys it is given.",
        "Defined without causality too: a window to both sides, sinks seen by all.",
    ),
    example={"window": 24, "sinks": 3, "block": 16},
    exact=lambda n: {"window": n, "sinks": 0, "block": 16},
    ladder=lambda n: tuple(
        {"window": max(n // part, 1), "sinks": min(64, max(n // 64, 1))} for part in (64, 32, 16, 8, 4)
    ),
)
@dataclass(frozen=True)
class SinkWindow(Selector):
    """Query i sees keys i - window + 1 .. i (both sides when not causal) and keys 0 .. sinks - 1.

    Args:
        window: Tokens to each visible side, the token itself included.
        sinks: First tokens that stay visible; with packed sequences, those of each sequence.
        block: Block size of the layout, in tokens.
    """

    window: int = 1024
    sinks: int = 4
    block: int = 64

    def __post_init__(self) -> None:
        require(self.window >= 1, "window", self.window, "at least 1 token")
        require(self.sinks >= 0, "sinks", self.sinks, "at least 0 tokens")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """Window and sinks, whatever the contents; a packed sequence has its own sinks."""
        queries, keys = q.shape[2], k.shape[2]
        right = 0 if geometry.causal else self.window - 1
        near = BlockLayout.window(queries, keys, self.window - 1, right, block=self.block, device=q.device)
        return near | first_tokens(self.sinks, queries, keys, geometry, self.block, q.device)
