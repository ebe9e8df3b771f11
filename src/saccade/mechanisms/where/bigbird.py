"""BigBird: a sliding window, random blocks per head, and global blocks (the ITC form)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Selector, require
from saccade.mechanisms.where._static import from_position_blocks, query_block_positions
from saccade.types import BlockLayout, Geometry, Kind


def _rung(n: int, size: int) -> dict[str, int]:
    """Settings for N tokens with window and random parts of `size` 128ths of the blocks."""
    block = min(64, max(n // 32, 1))
    count = size * max(1, -(-n // block) // 128)
    return {"window": count, "random": count, "global_blocks": max(1, count // 2), "block": block}


@register(
    "bigbird",
    Kind.SELECTOR,
    summary="Window, random and global blocks: linear cost, any two tokens few hops apart.",
    papers=("Big Bird: Transformers for Longer Sequences",),
    year=2020,
    code="google-research/bigbird",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse", "streaming"}),
    training_free=False,
    exact_when="window * block >= N",
    complexity="N",
    deviations=(
        (
            "Causal use is ours (the paper's decoder is dense): the window looks back, random blocks are drawn among "
            "earlier ones, and only the first blocks are global, seen by all later tokens."
        ),
        (
            "Random blocks are uniform over all blocks outside window and globals, as in the paper; the authors' code "
            "draws them, for long inputs, from the first 2 r + 5 blocks only."
        ),
        "The ETC form, with extra global tokens that are not part of the text, is not built.",
        "The authors train with the pattern; on weights trained without it, quality has to be measured.",
    ),
    heads_differ=True,
    example={"window": 1, "random": 2, "global_blocks": 1, "block": 4},
    exact=lambda n: {"window": n, "random": 0, "global_blocks": 0, "block": min(64, max(n // 32, 1))},
    ladder=lambda n: tuple(_rung(n, size) for size in (1, 2, 4, 8, 16)),
)
@dataclass(frozen=True)
class BigBird(Selector):
    """Query block i of head h sees blocks i - window .. i + window, the global ones, and `random` others.

    Random blocks depend on (seed, head, i) only: not on the device and, when causal, not on N. Give each layer its own
    seed.

    Args:
        window: Blocks to each visible side of the query's own.
        random: Random blocks per query block and head.
        global_blocks: First blocks, and when not causal also last blocks, that all see and that see all.
        block: Block size in tokens.
        seed: Of the random blocks.
    """

    window: int = 1
    random: int = 3
    global_blocks: int = 1
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("window", "random", "global_blocks"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0 blocks")
        require(self.block >= 1, "block", self.block, "at least 1 token")
        require(0 <= self.seed < 2**31, "seed", self.seed, "a number in [0, 2^31)")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """Window and random blocks from lists, global blocks as columns and rows."""
        heads, queries, keys, device = q.shape[1], q.shape[2], k.shape[2], q.device
        key_blocks = -(-keys // self.block)
        row = query_block_positions(queries, keys, self.block, device)
        last = row if geometry.causal else torch.full_like(row, key_blocks - 1)
        reach = min(self.window, key_blocks)
        near = row[:, None] + torch.arange(-reach, reach + 1, device=device)
        near = torch.where((near >= 0) & (near <= last[:, None]), near, -1)
        other = self._random_blocks(heads, row, last, geometry.causal)
        chosen = torch.cat([near.expand(heads, -1, -1), other], -1)[None]
        layout = from_position_blocks(chosen, queries, keys, self.block)
        if self.global_blocks == 0:
            return layout
        token = torch.arange(keys, device=device)
        edge = token // self.block < self.global_blocks
        if not geometry.causal:
            edge |= token // self.block >= key_blocks - self.global_blocks
        seeing = None if geometry.causal else token[edge]
        return layout | BlockLayout.tokens(
            queries, keys, key_tokens=token[edge], query_tokens=seeing, block=self.block, device=device
        )  # fmt: skip

    def _random_blocks(self, heads: int, row: Tensor, last: Tensor, causal: bool) -> Tensor:
        """Distinct blocks outside window and globals, uniform; int64 `[H, R, random]`, -1 where there are too few."""
        low = self.global_blocks
        high = last + 1 if causal else last + 1 - self.global_blocks
        hole = (row - self.window).clamp(min=low)
        width = (torch.minimum(row + self.window + 1, high) - hole).clamp(min=0)
        hole = torch.where(width > 0, hole, high)
        free = (high - low - width).clamp(min=0)
        chosen = torch.empty(heads, len(row), 0, dtype=torch.int64, device=row.device)
        head = torch.arange(heads, device=row.device)[:, None]
        for draw in range(min(self.random, int(free.max()) if len(row) else 0)):
            left = free - draw
            rank = _hash(_hash(_hash(head + self.seed * 8191) + row) + draw) % left.clamp(min=1)
            # The rank counts blocks not yet chosen; each chosen one at or below it moves it up by one.
            earlier = chosen.sort(-1).values
            taken = earlier - torch.arange(draw, device=row.device) <= rank[..., None]
            rank = torch.where(left > 0, rank + taken.sum(-1), 2**40)
            chosen = torch.cat([chosen, rank[..., None]], -1)
        block = chosen + low
        block = block + width[:, None] * (block >= hole[:, None])
        return torch.where(chosen < free[:, None], block, -1)


def _hash(value: Tensor) -> Tensor:
    """A fixed scramble of int64 `value`, uniform in [0, 2^32), the same on every device."""
    value = value & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x045D9F3B) & 0xFFFFFFFF
    return value ^ (value >> 16)
