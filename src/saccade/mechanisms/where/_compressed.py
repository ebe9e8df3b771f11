"""What InfLLM-V2, NSA and SSA share: keys compressed in windows, what these say of blocks, and lists of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops import gather_attend
from saccade.ops.checks import accumulation_dtype
from saccade.types import TokenIndex


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


def windows_of_blocks(weights: Tensor, blocks: int, block: int, size: int, stride: int) -> Tensor:
    """Weights of the windows that share a token with each block: `[..., blocks, windows per block]`.

    Args:
        weights: `[..., W]`.
        blocks: Number of blocks of keys.
        block: Keys per block, a multiple of `stride`.
        size: Keys per window, a multiple of `stride`.
        stride: Keys from one window to the next.

    Returns:
        A view of the padded weights; windows that do not exist weigh 0.
    """
    per_block, before = block // stride, size // stride - 1
    # Block c meets the windows c * per_block - before ... c * per_block + per_block - 1.
    padded = torch.nn.functional.pad(weights, (before, blocks * per_block - weights.shape[-1]))
    return padded.unfold(-1, per_block + before, per_block)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, most: int) -> Tensor:
    """Causal attention of each query to its own blocks of keys, which the heads of a group share.

    Args:
        q: `[B, H, N, D]`.
        k: `[B, G, N, D]`.
        v: `[B, G, N, E]`.
        chosen: Bool `[B, G, N, blocks]`, at most `most` in a row.
        block: Keys per block.
        most: Blocks that are listed for each query.

    Returns:
        `[B, H, N, E]`. Shapes do not depend on the choice, so that it can be traced.
    """
    batch, groups, tokens = chosen.shape[:3]
    listed = chosen.to(torch.int8).topk(min(most, chosen.shape[-1]), -1)
    keys = (listed.indices[..., None] * block + torch.arange(block, device=q.device)).flatten(-2)
    place = torch.arange(tokens, device=q.device)[:, None]
    kept = (listed.values > 0).repeat_interleave(block, -1) & (keys <= place)
    index = TokenIndex(torch.where(kept, keys, -1).flatten(0, 1)[:, None], tokens, tokens)
    q, k, v = (x.reshape(batch * groups, -1, tokens, x.shape[3]) for x in (q, k, v))
    return gather_attend(q, k, v, index).reshape(batch, -1, tokens, v.shape[3])
