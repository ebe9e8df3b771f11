"""Sink + sliding window: the last `window` tokens and the first `sinks` tokens (SF-Attn's pattern)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Selector, require
from saccade.types import BlockLayout, Geometry, Kind


@register(
    "sink_window",
    Kind.SELECTOR,
    summary="The first tokens, which hold attention sinks, and a sliding window.",
    papers=("SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",),
    other_papers=("Efficient Streaming Language Models with Attention Sinks",),
    year=2024,
    code="Dexter-GT-86/SinkLoRA",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse", "segments", "streaming"}),
    training_free=True,
    exact_when="window >= N",
    complexity="N",
    example={"window": 24, "sinks": 3, "block": 16},
    exact=lambda n: {"window": n, "sinks": 0, "block": 16},
    ladder=lambda n: tuple({"window": max(n // part, 1), "sinks": min(64, n)} for part in (16, 8, 4, 2)),
)
@dataclass(frozen=True)
class SinkWindow(Selector):
    """Query i sees keys i - window + 1 .. i (both sides when not causal) and keys 0 .. sinks - 1.

    Args:
        window: Tokens to each visible side, the token itself included.
        sinks: First tokens that stay visible.
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
        """Window and sinks, whatever the contents."""
        queries, keys = q.shape[2], k.shape[2]
        right = 0 if geometry.causal else self.window - 1
        near = BlockLayout.window(queries, keys, self.window - 1, right, block=self.block, device=q.device)
        sinks = torch.arange(min(self.sinks, keys), device=q.device)
        return near | BlockLayout.tokens(queries, keys, key_tokens=sinks, block=self.block, device=q.device)
