"""SeNER's arrow attention: a sliding window to both sides, and a first token that sees all and is seen by all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import PLAIN, Selector, require
from saccade.mechanisms.where._static import first_tokens, places
from saccade.ops.checks import check_qkv, check_segments
from saccade.types import AttentionOutput, BlockLayout, Geometry, Kind, Pattern

TRAINED_LENGTH = 512
"""Length at which LogN-Scaling leaves the scores as they are."""


@register(
    "arrow",
    Kind.SELECTOR,
    summary="A window to both sides; the first token sees all, is seen by all, and its scores grow with log length.",
    papers=("Small Language Model Makes an Effective Long Text Extractor",),
    year=2025,
    code="THUDM/scholar-profiling",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse", "segments"}),
    exact_when="window >= N, length_scaling = False",
    complexity="N",
    deviations=(
        "The other half of SeNER, attention between spans, is the layer `bispa`.",
        "The length that scales the scores is that of the sequence; the authors' code counts its padding, too.",
        "For any q, k, v; the authors' encoder is DeBERTa, whose disentangled position scores are left to the model.",
    ),
    example={"window": 12, "block": 16},
    exact=lambda n: {"window": n, "length_scaling": False},
)
@dataclass(frozen=True)
class Arrow(Selector):
    """Query i sees keys i - window .. i + window and key 0; query 0 ([CLS]) sees all, scaled by log_512(N) D^-0.5.

    Args:
        window: Tokens to each side, beside the token itself.
        length_scaling: Multiply the scores of query 0 by log N / log 512, N being the length of its sequence.
        block: Block size of the layout, in tokens.
    """

    adds = True

    window: int = 128
    length_scaling: bool = True
    block: int = 64

    def __post_init__(self) -> None:
        require(self.window >= 0, "window", self.window, "at least 0 tokens")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """Band, first column and first row, whatever the contents; a packed sequence has its own."""
        queries, keys = q.shape[2], k.shape[2]
        near = BlockLayout.window(queries, keys, self.window, self.window, block=self.block, device=q.device)
        column = first_tokens(1, queries, keys, geometry, self.block, q.device)
        first = places(geometry, keys, q.device) == 0
        row = BlockLayout.tokens(
            queries, keys, query_tokens=first.any(0).nonzero()[:, 0], block=self.block, device=q.device
        )  # fmt: skip
        if geometry.kv_segments is not None:
            row = BlockLayout.from_mask_mod(
                lambda b, h, i, j: first[b, i],  # noqa: ARG005
                queries,
                keys,
                batch=len(first),
                block=self.block,
                candidates=row.within(geometry),
            )
        return near | column | row

    def __call__(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, scale: float | None = None,
        return_lse: bool = False, impl: str = "auto",
    ) -> Tensor | AttentionOutput:  # fmt: skip
        """As for every selector."""
        check_qkv(q, k, v)
        check_segments(q, k, geometry.q_segments, geometry.kv_segments)
        if self.length_scaling and q.shape[2] == k.shape[2]:
            q = q * self._factors(k, geometry).to(q.dtype)
        return super().__call__(q, k, v, geometry=geometry, scale=scale, return_lse=return_lse, impl=impl)  # type: ignore[call-overload, no-any-return]

    def _factors(self, k: Tensor, geometry: Geometry) -> Tensor:
        """What each query is multiplied by: `[B or 1, 1, N, 1]`."""
        first = places(geometry, k.shape[2], k.device) == 0
        sequence = first.long().cumsum(1) - 1
        length = torch.zeros_like(sequence).scatter_add_(1, sequence, torch.ones_like(sequence)).gather(1, sequence)
        factor = torch.where(first, length.double().log() / math.log(TRAINED_LENGTH), 1.0)
        return factor[:, None, :, None]
