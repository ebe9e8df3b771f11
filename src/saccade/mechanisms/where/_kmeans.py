"""K-means clustering, batched over sequences and heads."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.checks import accumulation_dtype


def kmeans(x: Tensor, clusters: int, iterations: int, seed: int) -> Tensor:
    """Lloyd's algorithm with Euclidean distance, for every sequence and head.

    Args:
        x: `[B, H, N, D]`.
        clusters: K, at least 1 where there are tokens.
        iterations: How often tokens are assigned, at least 1; centroids move between.
        seed: Draws the tokens that are the first centroids, the same places for all sequences and heads.

    Returns:
        Cluster of each token, int64 `[B, H, N]`. A cluster that loses all its tokens keeps its centroid.
    """
    batch, heads, tokens, dim = x.shape
    x = x.to(accumulation_dtype(x.dtype))
    if tokens == 0:
        return torch.empty(batch, heads, 0, dtype=torch.int64, device=x.device)
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)).to(x.device)
    centroids = x.index_select(2, drawn[torch.arange(clusters, device=x.device) % tokens])
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * clusters
    labels = nearest(x, centroids)
    for _ in range(iterations - 1):
        rows = (labels + first).flatten()
        sums = x.new_zeros(batch * heads * clusters, dim).index_add_(0, rows, x.reshape(-1, dim))
        sizes = torch.bincount(rows, minlength=batch * heads * clusters)[:, None]
        means = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids.flatten(0, 2))
        centroids = means.view(batch, heads, clusters, dim)
        moved = nearest(x, centroids)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Number of the nearest centroid `[B, H, K, D]` of each token `[B, H, N, D]`: int64 `[B, H, N]`."""
    half_squares = centroids.square().sum(-1) / 2  # |x|^2 is the same for all centroids
    return (x @ centroids.mT - half_squares[..., None, :]).argmax(-1)
