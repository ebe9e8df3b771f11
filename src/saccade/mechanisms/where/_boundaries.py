"""DHSA's predictor of chunk boundaries: what it is, what it is trained on, and how boundaries are picked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.mechanisms.base import require
from saccade.mechanisms.where._blocks import head_scores, largest
from saccade.ops.checks import accumulation_dtype

CHUNK_SCORES = 1 << 22
"""Attention weights that are held at a time."""


class BoundaryPredictor(nn.Module):
    """For each place t, how unlike the `window` keys up to t are those after it: logits `[B, N]` from k `[B, G, N, D]`.

    The 2 * window keys around t, heads side by side, attend to each other and are normalised; the means of both halves,
    l and r, give MLP([l, r, |l - r|, l * r, cos(l, r)]). Keys past the ends are zeros.

    Args:
        channels: G times D, a multiple of `heads`.
        window: Keys on either side.
        hidden: Width of the MLP.
        heads: Heads of the attention among the keys of a window.
    """

    def __init__(self, channels: int, window: int = 4, hidden: int = 256, heads: int = 8) -> None:
        super().__init__()
        require(heads >= 1 and channels % heads == 0, "heads", heads, f"a divisor of channels={channels}")
        require(window >= 1, "window", window, "at least 1 token")
        require(hidden >= 1, "hidden", hidden, "at least 1 channel")
        self.channels, self.window = channels, window
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, k: Tensor) -> Tensor:
        """Logits `[B, N]`: the larger, the more likely a chunk ends with this key."""
        batch, groups, tokens, dim = k.shape
        if groups * dim != self.channels:
            raise ValueError(f"k of shape {tuple(k.shape)}: expected heads times dim to be channels={self.channels}")
        side = k.transpose(1, 2).flatten(2).to(self.norm.weight.dtype)
        padded = nn.functional.pad(side, (0, 0, self.window - 1, self.window))
        around = padded.unfold(1, 2 * self.window, 1).transpose(2, 3).flatten(0, 1)
        mixed = self.norm(self.attention(around, around, around, need_weights=False)[0])
        left, right = (half.mean(1) for half in mixed.chunk(2, 1))
        alike = nn.functional.cosine_similarity(left, right, dim=-1, eps=1e-6)[:, None]
        features = torch.cat([left, right, (left - right).abs(), left * right, alike], -1)
        return self.mlp(features).view(batch, tokens)


def boundary_ratios(q: Tensor, k: Tensor, window: int = 4) -> Tensor:
    """What the predictor learns: how much more one side of a place is attended to than the other, `[B, N]`, at least 1.

    For place t, the attention that all queries from t + window on give, in the mean over heads, to the `window` keys up
    to t and to those after it: the larger sum over the smaller. 0 where `window` keys are missing on a side, or where
    no query is left. Costs dense attention, in bounded memory: for training.

    Args:
        q: `[B, H, N, D]`.
        k: `[B, G, N, D]`.
        window: Keys on either side.

    Returns:
        The ratios, at least fp32.
    """
    tokens, dtype = k.shape[2], accumulation_dtype(q.dtype)
    places = torch.arange(tokens, device=q.device)
    before, after = (torch.zeros(q.shape[0], tokens, dtype=dtype, device=q.device) for _ in range(2))
    step = max(CHUNK_SCORES // max(q.shape[0] * q.shape[1] * tokens, 1), 1)
    for first in range(0, tokens, step):
        row = places[first : first + step, None]
        scores = head_scores(q[:, :, first : first + step].to(dtype) * q.shape[3] ** -0.5, k.to(dtype))
        weights = scores.masked_fill(places > row, -float("inf")).softmax(-1).mean(1)
        total = nn.functional.pad(weights.cumsum(-1), (window, window), mode="replicate")
        total[..., :window] = 0.0
        sums = total[..., window:] - total[..., :-window]  # of the `window` keys up to t, for t = 0 .. N + window - 1
        asking = places <= row - window
        before += sums[..., :tokens].masked_fill(~asking, 0.0).sum(1)
        after += sums[..., window:].masked_fill(~asking, 0.0).sum(1)
    larger, smaller = torch.maximum(before, after), torch.minimum(before, after)
    complete = (places >= window - 1) & (places < tokens - window)
    return torch.where(complete, (larger + 1e-6) / (smaller + 1e-6), 0.0)


def pick_boundaries(scores: Tensor, count: int, theta: float, apart: int) -> Tensor:
    """Greedy non-maximum suppression: the best places above `theta` that are more than `apart` from better ones.

    Args:
        scores: `[B, N]`.
        count: How many are picked at most.
        theta: Least score.
        apart: Places within this distance of a picked one are passed over.

    Returns:
        Bool `[B, N]`.
    """
    left = scores.masked_fill(~(scores > theta), -float("inf"))
    picked = torch.zeros_like(scores, dtype=torch.bool)
    while bool((left > -float("inf")).any()):
        # Whatever is best within its reach would be picked before its neighbours: all of these at once.
        best = _reach(left, apart) == left
        best &= left > -float("inf")
        best &= best.cumsum(-1) - nn.functional.pad(best.cumsum(-1), (apart + 1, 0))[:, : -apart - 1] == 1  # ties
        picked |= best
        left = left.masked_fill(_reach(best.to(scores), apart) > 0, -float("inf"))
    return largest(scores.masked_fill(~picked, -float("inf")), count) & picked


def _reach(x: Tensor, apart: int) -> Tensor:
    """Largest value within `apart` places on either side: `[B, N]`."""
    return nn.functional.max_pool1d(x[:, None], 2 * apart + 1, 1, apart)[:, 0]
