"""S2-Attention: a local window plus, per head, its own shard of the context in strided blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Selector, require
from saccade.mechanisms.where._static import from_position_blocks, query_block_positions
from saccade.types import BlockLayout, Geometry, Kind


def _rung(n: int, stride: int, local: int) -> dict[str, int]:
    """Settings for N tokens that keep about 1 / stride + local / 64 of the causal area."""
    block = min(64, max(n // 32, 1))
    return {"stride": stride, "local_blocks": max(1, -(-n // block) * local // 128), "block": block}


@register(
    "s2_attention",
    Kind.SELECTOR,
    summary="A local window and a strided shard of the context per head; the shards together cover it.",
    papers=("Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",),
    year=2024,
    code="linxihui/dkernel",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse", "streaming"}),
    training_free=False,
    exact_when="stride = 1, or local_blocks * block >= N",
    complexity="N^2",
    deviations=(
        (
            "Not causal: each head keeps its own shard by absolute position. The authors' default there is strides "
            "relative to the query, the same in all heads."
        ),
        "The authors' dense heads and layers are left to the caller: apply the mechanism to the layers that bear it.",
        (
            "With `per_key_head` the step between shards is stride // G over the G key/value heads; the authors' code "
            "divides by the H query heads still."
        ),
        "The authors train with the pattern; on weights trained without it, quality has to be measured.",
    ),
    heads_differ=True,
    example={"stride": 4, "local_blocks": 2, "block": 8},
    exact=lambda n: {"stride": 1, "local_blocks": 1, "block": min(64, max(n // 32, 1))},
    ladder=lambda n: (_rung(n, 32, 2), _rung(n, 16, 4), _rung(n, 8, 8), _rung(n, 4, 16)),
)
@dataclass(frozen=True)
class S2Attention(Selector):
    """Query block i sees key blocks j with i - j < local_blocks, and those with (j + h * step + offset) % stride == 0.

    step = max(1, stride // H), so H >= stride heads cover the whole context between them. When not causal, the local
    blocks lie on both sides.

    Args:
        stride: Blocks per block that is kept beyond the local ones; 1 keeps all.
        local_blocks: Blocks to each visible side, that of the query included.
        block: Block size in tokens.
        offset: Rotates which head gets which shard; 0 gives block 0 to head 0.
        homogeneous: All heads take the shard of head 0.
        per_key_head: Query heads that share a key/value head share a shard, so that its cache can drop the rest.
    """

    stride: int = 8
    local_blocks: int = 16
    block: int = 64
    offset: int = 0
    homogeneous: bool = False
    per_key_head: bool = False

    def __post_init__(self) -> None:
        require(self.stride >= 1, "stride", self.stride, "at least 1 block")
        require(self.local_blocks >= 1, "local_blocks", self.local_blocks, "at least 1 block, that of the query")
        require(self.block >= 1, "block", self.block, "at least 1 token")
        require(0 <= self.offset < self.stride, "offset", self.offset, f"blocks in [0, stride={self.stride})")

    def _phases(self, heads: int, key_heads: int) -> Tensor:
        """First strided key block of each query head, int64 `[H]`."""
        if self.homogeneous:
            return torch.full((1,), -self.offset % self.stride)
        shards = key_heads if self.per_key_head else heads
        head = torch.arange(heads) // (heads // shards)
        return -(head * max(1, self.stride // shards) + self.offset) % self.stride

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """Block lists per head and block of query positions."""
        queries, keys, device = q.shape[2], k.shape[2], q.device
        row = query_block_positions(queries, keys, self.block, device)[:, None]
        key_blocks = -(-keys // self.block)
        phase = self._phases(q.shape[1], k.shape[1]).to(device)[:, None, None]
        far = phase + self.stride * torch.arange(-(-key_blocks // self.stride), device=device)  # [H, 1, J]
        span = torch.arange(1 - self.local_blocks, 1 if geometry.causal else self.local_blocks, device=device)
        near = (row + span).expand(len(phase), -1, -1)  # [H, R, L]
        last = row if geometry.causal else torch.full_like(row, key_blocks - 1)
        kept = (far <= last) & (far < key_blocks) & ((far - row).abs() >= self.local_blocks)
        near = torch.where((near >= 0) & (near <= last) & (near < key_blocks), near, -1)
        chosen = torch.cat([near, torch.where(kept, far, -1)], -1)[None]
        return from_position_blocks(chosen, queries, keys, self.block)
