"""BLADE's adaptive block-sparse attention: sampled tokens rank the blocks, and lower ranks are read coarser."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import PLAIN, require, require_pattern
from saccade.mechanisms.where._blocks import head_scores, mean_pool
from saccade.mechanisms.where._regions import (
    Plan,
    Regions,
    RegionSelector,
    curve_blocks,
    grid_of,
    keep_text,
    regions_layout,
)
from saccade.mechanisms.where._weighted import attend_weighted, merge_first
from saccade.ops import block_attend
from saccade.ops.checks import accumulation_dtype, check_qkv, check_segments, resolve_scale
from saccade.ops.dispatch import RunRecord, is_recording, record
from saccade.types import AttentionOutput, BlockLayout, Geometry, Kind, Pattern

STEPS = (1, 2, 4, 8)
"""Tokens behind one key, from the best ranks on."""

WORKSPACE = 2**24
"""Sampled scores held at a time."""


@register(
    "asa",
    Kind.SELECTOR,
    summary="Blocks ranked by the largest weights among sampled tokens; best ones in full, others pooled by 2, 4, 8.",
    papers=("Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation",),
    year=2025,
    code="xiaolong-li1/VIDEO-BLADE",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="shares = (1, 1, 1, 1)",
    complexity="N^2",
    deviations=(
        (
            "The attention alone; BLADE trains it within step distillation (trajectory distribution matching), which "
            "is not built. The rule is that of the authors' CogVideoX code."
        ),
        (
            "The samples are drawn from `seed`, the same for all heads and calls; the authors draw them for each head "
            "and call anew."
        ),
        (
            "Blocks follow the Hilbert curve of the smallest enclosing cube, not its generalisation to boxes "
            "(Gilbert). Blocks and pooled keys at the end that are not full count their own tokens; the authors "
            "repeat the last one."
        ),
        (
            "Text is not ranked, it sees and is seen by all; the authors rank it, then keep the last two blocks. The "
            "best block is always read in full, so that no query is left with nothing."
        ),
        (
            "W is not divided by the sum over the sampled keys, as the authors' kernel does not either (it never adds "
            "that sum up), so that all blocks with the best key of some sampled query tie at 1. The nearer the start "
            "goes first; theirs come in any order."
        ),
        "Sampled scores are scaled by D^-0.5 whatever `scale` the attention uses.",
    ),
    example={"shares": (0.2, 0.4, 0.6, 0.8), "samples": 4, "block": 16},
    exact=lambda n: {"shares": (1.0, 1.0, 1.0, 1.0), "block": 16},  # noqa: ARG005
    ladder=lambda n: tuple(
        {"shares": shares, "samples": 8, "block": max(8, min(64, n // 128 * 8))}
        for shares in ((0.05, 0.15, 0.25, 0.5), (0.1, 0.3, 0.5, 1.0), (0.25, 0.5, 1.0, 1.0), (0.5, 1.0, 1.0, 1.0))
    ),
)
@dataclass(frozen=True)
class ASA(RegionSelector):
    """Block i ranks the blocks j by W_ij = max over sampled q in i of exp(max over sampled k in j of q . k s - m_q).

    m_q is the largest score of q with any sampled key, s = 1 / sqrt(D). Of n blocks those of the first
    int(shares[0] n) ranks, the very first in any case, are attended to token by token; those up to int(shares[1] n)
    with their keys and values averaged in twos, then in fours and eights, each mean counted as the tokens behind it;
    the rest are left out.

    Args:
        shares: Fractions of the blocks, rising, up to which keys are read by 1, 2, 4 and 8.
        samples: Tokens sampled in each block of queries and of keys.
        seed: Draws the samples.
        block: Tokens per block, along a Hilbert curve; a multiple of 8.
    """

    adds = True

    shares: tuple[float, float, float, float] = (0.05, 0.15, 0.25, 0.5)
    samples: int = 32
    seed: int = 0
    block: int = 128

    def __post_init__(self) -> None:
        rising = len(self.shares) == len(STEPS) and all(
            0 <= low <= high <= 1 for low, high in zip((0.0, *self.shares[:-1]), self.shares, strict=True)
        )
        require(rising, "shares", self.shares, "four fractions in [0, 1], none below the one before")
        require(self.samples >= 1, "samples", self.samples, "at least 1 token")
        require(self.block >= 8 and self.block % 8 == 0, "block", self.block, "a multiple of 8 tokens")

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry) -> Plan:
        """Blocks along the Hilbert curve, and those read token by token; the coarser ones are added by the call."""
        regions, steps = self._steps(q, k, geometry)
        return self._plan(regions, steps)

    def _plan(self, regions: Regions, steps: Tensor) -> Plan:
        chosen = keep_text(steps == 1, regions, regions)
        return Plan(regions, regions, regions_layout(chosen, regions, regions, self.block))

    def _steps(self, q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Regions, Tensor]:
        """The blocks, and how many tokens lie behind a key that block i reads of block j: `[B, H, R, R]`, 0 = none."""
        grid = grid_of(q, k, geometry)
        regions = curve_blocks(grid, self.block, geometry, q.device)
        count = regions.count - regions.text
        cells = math.prod(grid)
        worth = self._worth(regions.move(q)[:, :, :cells], regions.move(k)[:, :, :cells], count)
        rank = worth.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        steps = torch.zeros_like(rank)
        for share, step in zip(reversed(self.shares), reversed(STEPS), strict=True):
            steps = torch.where(rank < max(int(share * count), step == 1), step, steps)
        return regions, steps

    def _worth(self, q: Tensor, k: Tensor, count: int) -> Tensor:
        """W of moved tokens of the grid, `[B, H, R, R]`."""
        q, k = (self._sampled(x, count, number) for number, x in enumerate((q, k)))  # [B, heads, R * samples, D]
        if count == 0:
            return q.new_zeros(*q.shape[:2], 0, 0)
        samples = q.shape[2] // count
        step = max(1, WORKSPACE // max(1, q.shape[0] * q.shape[1] * samples * k.shape[2]))  # blocks of queries
        found = []
        for rows in q.split(step * samples, 2):
            best = (head_scores(rows, k) * q.shape[3] ** -0.5).unflatten(3, (count, -1)).amax(4)
            best = (best - best.amax(3, keepdim=True)).exp()
            found.append(best.unflatten(2, (-1, samples)).amax(3))
        return torch.cat(found, 2)

    def _sampled(self, x: Tensor, count: int, number: int) -> Tensor:
        """The sampled tokens of each block; where the last block has no such token, its last."""
        drawn = torch.randperm(self.block, generator=torch.Generator().manual_seed(self.seed + number))[: self.samples]
        place = torch.arange(count)[:, None] * self.block + drawn
        x = x.to(accumulation_dtype(x.dtype))
        return x.index_select(2, place.flatten().clamp(max=max(x.shape[2] - 1, 0)).to(x.device))

    def __call__(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, scale: float | None = None,
        return_lse: bool = False, impl: str = "auto",
    ) -> Tensor | AttentionOutput:  # fmt: skip
        """As for every selector."""
        check_qkv(q, k, v)
        check_segments(q, k, geometry.q_segments, geometry.kv_segments)
        require_pattern(self.card, q, k, geometry)
        started = time.perf_counter()
        regions, steps = self._steps(q.detach(), k.detach(), geometry)
        plan = self._plan(regions, steps)
        if is_recording():
            record(RunRecord("select", self.card.name, select_seconds=time.perf_counter() - started))
        factor = resolve_scale(scale, q.shape[3])
        q, k, v = (regions.move(x) for x in (q, k, v))
        out, lse = block_attend(q, k, v, plan.layout, scale=factor, return_lse=True, impl=impl)
        cells = q.shape[2] - geometry.prefix - geometry.suffix
        parts = []
        for step in STEPS[1:] if cells else ():
            keys, values = (mean_pool(x[:, :, :cells], step) for x in (k, v))
            layout = BlockLayout.from_block_mask(
                steps == step, self.block, self.block // step, cells, keys.shape[2]
            )  # fmt: skip
            left = cells - torch.arange(keys.shape[2], device=q.device) * step
            parts.append(
                attend_weighted(q[:, :, :cells], keys, values, left.clamp(max=step), layout, factor, impl)
            )  # fmt: skip
        out, lse = merge_first(AttentionOutput(out, lse), parts)
        out = regions.restore(out)
        return AttentionOutput(out, regions.restore(lse)) if return_lse and lse is not None else out
