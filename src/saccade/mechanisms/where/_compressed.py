"""What InfLLM-V2 and NSA share: overlapping windows of keys, each compressed to one, and what they say of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.checks import accumulation_dtype


def windows(x: Tensor, size: int, stride: int) -> Tensor:
    """The whole windows of `[B, G, N, D]`: `[B, G, W, size, D]`, W = (N - size) // stride + 1 (0 if N < size)."""
    if x.shape[2] < size:
        return x.new_empty(*x.shape[:2], 0, size, x.shape[3])
    return x.unfold(2, size, stride).transpose(-1, -2)


def window_means(k: Tensor, size: int, stride: int) -> Tensor:
    """Mean key of each window, at least fp32: `[B, G, W, D]`."""
    return windows(k.to(accumulation_dtype(k.dtype)), size, stride).mean(3)


def past_windows(places: Tensor, count: int, size: int, stride: int) -> Tensor:
    """Windows that end at or before each place: bool `[places, count]`."""
    last = torch.arange(count, device=places.device) * stride + size - 1
    return last <= places[:, None]


def overlap(blocks: int, block: int, count: int, size: int, stride: int, device: torch.device) -> Tensor:
    """Strides that block c of keys and window w have in common: int64 `[blocks, count]`, 0 where they are apart.

    Sizes are multiples of `stride`, so that both are runs of whole strides.
    """
    first_block = torch.arange(blocks, device=device)[:, None] * (block // stride)
    first_window = torch.arange(count, device=device)
    last = torch.minimum(first_block + block // stride, first_window + size // stride)
    return (last - torch.maximum(first_block, first_window)).clamp(min=0)
