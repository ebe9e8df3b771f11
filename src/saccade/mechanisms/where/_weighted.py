"""Attention to keys that stand for several: means of blocks and clusters, each counted as the tokens behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops import attend, block_attend, merge
from saccade.types import AttentionOutput, BlockLayout


def attend_weighted(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, layout: BlockLayout | None, scale: float, impl: str
) -> AttentionOutput:
    """Softmax attention with the weights weight_j exp(scale q . k_j), and its log-sum-exp.

    Args:
        q: `[B, H, M, D]`.
        k: `[B, G, n, D]`, brought to the dtype of q.
        v: `[B, G, n, E]`, likewise.
        weight: Positive, broadcasts to `[B, G, n]`.
        layout: The pairs; None means all.
        scale: Factor on q k^T.
        impl: Implementation of the engine.

    Returns:
        `out` `[B, H, M, E]` and `lse` `[B, H, M]`.
    """
    extra = (weight.to(k.dtype).log() / scale).expand(k.shape[:3])[..., None]
    keys = torch.cat([k, extra], -1).to(q.dtype)
    queries = torch.cat([q, torch.ones_like(q[..., :1])], -1)  # one more channel adds log(weight) to the score
    options: dict[str, Any] = {"scale": scale, "return_lse": True, "impl": impl}
    if layout is None:
        return attend(queries, keys, v.to(q.dtype), **options)
    return block_attend(queries, keys, v.to(q.dtype), layout, **options)


def merge_first(whole: AttentionOutput, parts: list[AttentionOutput]) -> AttentionOutput:
    """`whole`, with `parts` over further keys merged into its first queries, as many as the parts have."""
    if not parts or whole.lse is None:
        return whole
    count = parts[0].out.shape[2]
    part = merge([(whole.out[:, :, :count], whole.lse[:, :, :count]), *parts])
    if part.lse is None or count == whole.out.shape[2]:
        return part
    out, lse = torch.cat([part.out, whole.out[:, :, count:]], 2), torch.cat([part.lse, whole.lse[:, :, count:]], 2)
    return AttentionOutput(out, lse)
