"""Routing attention: clusters learned by online k-means; tokens attend to those of their cluster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.ops import attend
from saccade.types import Kind, Pattern

LEAST = 1e-5
"""Smallest count that a centroid's sum is divided by."""


@register(
    "routing_attention",
    Kind.LAYER,
    summary="Each cluster's nearest tokens attend to each other; centroids follow them by moving averages.",
    papers=("Efficient Content-Based Sparse Attention with Routing Transformers",),
    year=2020,
    code="google-research/google-research",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        (
            "With causal=True no token sees a later one, as in the paper; but which tokens a cluster takes depends on "
            "later ones, which a step-by-step decoder cannot know, so causal self-attention is not listed above."
        ),
        (
            "clusters and window are settings, so that work grows with N, and tokens that no cluster takes get 0; the "
            "paper has about sqrt(N) clusters of N / clusters tokens, N^1.5."
        ),
        (
            "Of a token that several clusters take the outputs are averaged; the authors divide by their number plus "
            "0.01."
        ),
        (
            "Counts of the moving average begin at 1, those of the authors at 0, which throws centroids far out at "
            "first; a count below 1e-5 is taken as that, theirs are smoothed by as much."
        ),
        (
            "With shared=False a step moves centroids once, by queries and keys together; the authors' twice, by "
            "queries and then by keys."
        ),
        (
            "Local heads have a sliding window; the authors' have blocks and the block before. Their learned relative "
            "positions, in local heads and by rank in clusters, are left to the model."
        ),
    ),
    example={"dim": 16, "heads": 4, "local_heads": 2, "clusters": 3, "window": 6, "local_window": 4},
)
class RoutingAttention(Layer):
    """Cluster c takes the `window` tokens with the largest norm(q_i) . mu_c (and of keys norm(k_j) . mu_c).

    Its queries attend to its keys, in the order of the sequence, by softmax(scale norm(q_i) . norm(k_j)); norm is layer
    norm without weights, and with `shared` keys are the queries. Outputs go back to their places. In training, once
    tokens are routed, mu_c = S_c / n_c with S_c <- decay S_c + (1 - decay) sum of the normed tokens x whose x . mu_c is
    the largest, n_c their number likewise. No gradient goes through the choice. Local heads attend to a window.

    In training take `with_loss(x)`, whose second value draws tokens to their centroids.

    Args:
        dim: Channels C, in and out; a multiple of `heads`.
        heads: H.
        local_heads: The first of them that attend to a window and not to clusters.
        clusters: Of each of the other heads.
        window: Tokens that a cluster takes, all if there are fewer.
        local_window: Tokens on each visible side of a local head's query, its own counted.
        causal: Hide later tokens; needs `shared`.
        shared: Routed keys are the queries.
        decay: Of the moving averages.
        scale: Of routed heads; their normed vectors have length sqrt(D). The authors' code comes out at 1.
    """

    centroids: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        local_heads: int = 4,
        clusters: int = 16,
        window: int = 512,
        local_window: int = 256,
        causal: bool = False,
        shared: bool = True,
        decay: float = 0.999,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        require(heads >= 1, "heads", heads, "at least 1")
        require(dim >= 1 and dim % heads == 0, "dim", dim, f"a positive multiple of heads={heads}")
        require(0 <= local_heads <= heads, "local_heads", local_heads, f"at most heads={heads}")
        require(clusters >= 1, "clusters", clusters, "at least 1")
        require(window >= 1, "window", window, "at least 1 token")
        require(local_window >= 1, "local_window", local_window, "at least 1 token")
        require(shared or not causal, "shared", shared, "True with causal=True")
        require(0 <= decay < 1, "decay", decay, "in [0, 1)")
        require(scale > 0, "scale", scale, "above 0")
        self.dim, self.heads, self.local_heads = dim, heads, local_heads
        self.window, self.local_window = window, local_window
        self.causal, self.shared, self.decay, self.scale = causal, shared, decay, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.projection = nn.Linear(dim, dim, bias=False)
        first = norm(torch.randn(heads - local_heads, clusters, dim // heads))
        self.register_buffer("centroids", first)
        self.register_buffer("sums", first.clone())
        self.register_buffer("counts", torch.ones(first.shape[:2]))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to tokens `[B, N, C]`; in training mode the centroids move."""
        (x,) = inputs
        return self.with_loss(x)[0]

    def with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and how far tokens are from their centroids.

        Args:
            x: `[B, N, C]`.

        Returns:
            `[B, N, C]`, and the mean square of normed routed queries (and keys) minus their centroids, a scalar; the
            authors add 1e-4 times it to the loss.
        """
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected [B, N, {self.dim}]")
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        near, far = slice(self.local_heads), slice(self.local_heads, None)
        after = 0 if self.causal else self.local_window - 1
        parts = []
        if self.local_heads:
            band = (self.local_window - 1, after)
            parts.append(attend(q[:, near], k[:, near], v[:, near], causal=self.causal, window=band))
        loss = x.new_zeros(())
        if self.local_heads < self.heads:
            queries = norm(q[:, far])
            keys = queries if self.shared else norm(k[:, far])
            parts.append(self._routed(queries, keys, v[:, far]))
            items = queries if self.shared else torch.cat([queries, keys], 2)
            own = (items.detach() @ self.centroids.mT).argmax(-1)
            loss = (items - self._centroid_of(own)).square().sum() / max(items.numel(), 1)
            if self.training:
                self._move(items.detach(), own)
        return self.projection(torch.cat(parts, 1).transpose(1, 2).flatten(2)), loss

    def _routed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within clusters, back in the places of the tokens: `[B, R, N, D]`."""
        rows = self._members(q.detach())
        columns = rows if self.shared else self._members(k.detach())
        inside = attend(
            _gather(q, rows), _gather(k, columns), _gather(v, columns), causal=self.causal, scale=self.scale
        )  # fmt: skip
        place = rows.flatten(2)[..., None]
        inside = inside.reshape(*place.shape[:3], v.shape[3])
        total = torch.zeros_like(v).scatter_add(2, place.expand_as(inside), inside)
        taken = torch.zeros_like(v[..., :1]).scatter_add(2, place, torch.ones_like(inside[..., :1]))
        return total / taken.clamp(min=1)

    def _members(self, x: Tensor) -> Tensor:
        """Tokens that each cluster takes, ascending: int64 `[B, R, clusters, min(window, N)]`."""
        nearness = self.centroids @ x.mT
        return nearness.topk(min(self.window, x.shape[2]), -1).indices.sort(-1).values

    def _centroid_of(self, own: Tensor) -> Tensor:
        """The centroid numbered `own` `[B, R, T]` of each token: `[B, R, T, D]`."""
        spread = self.centroids.expand(len(own), -1, -1, -1)
        return spread.gather(2, own[..., None].expand(*own.shape, spread.shape[3]))

    @torch.no_grad()
    def _move(self, items: Tensor, own: Tensor) -> None:
        """Moving averages of the tokens `[B, R, T, D]` nearest to each centroid."""
        hot = nn.functional.one_hot(own, self.centroids.shape[1]).to(items.dtype)
        self.sums.lerp_((hot.mT @ items).sum(0).to(self.sums.dtype), 1 - self.decay)
        self.counts.lerp_(hot.sum((0, 2)).to(self.counts.dtype), 1 - self.decay)
        self.centroids.copy_(self.sums / self.counts.clamp(min=LEAST)[..., None])

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """Two dozen tokens and one of the example's channels."""
        return (torch.randn(batch, 25, 16, generator=generator).to(device, dtype),)


def norm(x: Tensor) -> Tensor:
    """Layer norm of the last axis, without weights."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def _gather(x: Tensor, members: Tensor) -> Tensor:
    """Members `[B, R, clusters, w]` of `[B, R, N, D]`: `[B, R * clusters, w, D]`."""
    taken = x.gather(2, members.flatten(2)[..., None].expand(-1, -1, -1, x.shape[3]))
    return taken.view(len(x), -1, members.shape[3], x.shape[3])
