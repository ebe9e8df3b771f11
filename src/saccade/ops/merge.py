"""Exact merging of partial softmax attention results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.types import AttentionOutput


def merge(parts: Sequence[AttentionOutput | tuple[Tensor, Tensor]]) -> AttentionOutput:
    """Combine attention over disjoint sets of keys into attention over all of them.

    Args:
        parts: `(out, lse)` of each part: `[B, H, M, E]` and `[B, H, M]`; a part that saw nothing has LSE -inf.

    Returns:
        `out` in the parts' dtype and the joint `lse`; rows that no part saw are 0 and -inf.

    Raises:
        ValueError: If there are no parts, or one lacks its LSE.
    """
    if not parts:
        raise ValueError("parts=[]: expected at least one (out, lse)")
    if any(lse is None for _, lse in parts):
        raise ValueError("parts: one has lse=None, expected results of return_lse=True")
    lses = torch.stack([lse for _, lse in parts if lse is not None])
    top = lses.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, torch.log(total) + top)
    out = sum(weight[..., None] * part[0].to(weight.dtype) for weight, part in zip(weights / total, parts, strict=True))
    return AttentionOutput(out.to(parts[0][0].dtype), lse)  # type: ignore[union-attr]
