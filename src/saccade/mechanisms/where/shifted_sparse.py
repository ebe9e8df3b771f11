"""Shifted sparse attention: heads attend within groups of tokens, part of the heads within groups shifted by half."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Selector, require
from saccade.mechanisms.where._static import first_tokens, places
from saccade.types import BlockLayout, Geometry, Kind


@register(
    "shifted_sparse",
    Kind.SELECTOR,
    summary="Attention within groups of tokens, shifted by half a group in part of the heads, plus sink tokens.",
    papers=("SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",),
    other_papers=("LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",),
    year=2023,
    code="Dexter-GT-86/SinkLoRA",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse", "segments", "streaming"}),
    training_free=False,
    exact_when="group >= 2 N, or group >= N with shifted = 0",
    complexity="N",
    deviations=(
        (
            "Shifted groups do not wrap around: the first and the last half group stay on their own, as in LongLoRA's "
            "flash-attention path. Its eager path rolls the sequence and masks in rolled order, which lets the first "
            "half group see the last: the future."
        ),
        (
            "SinkLoRA's repository holds LongLoRA's S2-Attn only, without sinks or reassembly. After the abstract, "
            "`shifted` is the share of heads left shifted (0.5 is LongLoRA) and `sinks` are the first tokens, seen by "
            "all; the paper's proportions are not reproduced."
        ),
        "A pattern for fine-tuning: the authors go back to full attention (or H2O eviction) at inference.",
        "group counts tokens; the authors take a quarter of the sequence and refuse lengths it does not divide.",
    ),
    heads_differ=True,
    example={"group": 16, "sinks": 2, "block": 8},
    exact=lambda n: {"group": 2 * max(n, 1), "sinks": 0},
    ladder=lambda n: tuple(
        {"group": 2 * max(n // part, 1), "sinks": min(64, max(n // 64, 1)), "block": min(64, max(n // 32, 1))}
        for part in (32, 16, 8, 4)
    ),
)
@dataclass(frozen=True)
class ShiftedSparse(Selector):
    """Token at place p sees those with the same (p + s_h) // group, s_h being group / 2 in shifted heads and else 0.

    The last `shifted` of the heads are shifted, rounded up as the authors do. Places count within packed sequences.

    Args:
        group: Tokens that attend to each other; even.
        shifted: Fraction of the heads, the last ones, whose groups are shifted by half a group.
        sinks: First tokens that every token sees (and that see every token when not causal).
        block: Block size of the layout, in tokens.
    """

    group: int = 2048
    shifted: float = 0.5
    sinks: int = 4
    block: int = 64

    def __post_init__(self) -> None:
        require(self.group >= 2 and self.group % 2 == 0, "group", self.group, "an even number of at least 2 tokens")
        require(0 <= self.shifted <= 1, "shifted", self.shifted, "a fraction of the heads in [0, 1]")
        require(self.sinks >= 0, "sinks", self.sinks, "at least 0 tokens")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """Groups are segments of their own, a set of them per head."""
        heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
        place = places(geometry, keys, q.device)
        still = math.floor(heads * (1 - self.shifted) + 1e-9)
        shift = (torch.arange(heads, device=q.device) >= still) * (self.group // 2)
        groups = ((place[:, None] + shift[:, None]) // self.group).flatten(0, 1)  # [B * H, N]
        near = BlockLayout.window(
            queries, keys, self.group - 1, 0 if geometry.causal else self.group - 1, block=self.block, device=q.device
        )
        near = near.within(Geometry(q_segments=groups[:, keys - queries :], kv_segments=groups))
        near = replace(near, batch=len(place), heads=heads)  # a batch of B * H patterns is one of B batches of H heads
        if self.sinks == 0:
            return near
        sinks = first_tokens(self.sinks, queries, keys, geometry, self.block, q.device)
        return near | sinks if geometry.causal else near | sinks | sinks.transpose()
