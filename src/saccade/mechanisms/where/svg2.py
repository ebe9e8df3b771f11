"""Sparse VideoGen 2: clusters of alike queries and of alike keys, and the top of the map between their centroids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.where._blocks import head_scores
from saccade.mechanisms.where._kmeans import kmeans
from saccade.mechanisms.where._regions import (
    Plan,
    Regions,
    RegionSelector,
    from_cells,
    grid_of,
    keep_text,
    regions_layout,
)
from saccade.types import Geometry, Kind, Pattern


@register(
    "svg2",
    Kind.SELECTOR,
    summary="K-means clusters of queries and keys; centroids score cluster pairs, of which the top p of mass are kept.",
    papers=(
        "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation",
    ),
    year=2025,
    code="svg-project/Sparse-VideoGen",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="top_p = 1",
    complexity="N^2",
    deviations=(
        (
            "Every call clusters anew; the authors carry the centroids from one denoising step to the next and then "
            "take 2 iterations instead of 50. Centroids are the means of the final clusters, theirs are one step old."
        ),
        (
            "The tokens that start k-means are drawn from `seed`, distinct, the same places in every head; the authors "
            "draw them anew for each, with repeats. All iterations are done unless no token changes its cluster; "
            "they also stop when centroids move less than 1e-4."
        ),
        (
            "Their kernel computes ragged cluster blocks without waste; here blocks of fixed size lie over the "
            "clusters, and those that several clusters meet in are computed and masked."
        ),
        "Centroid scores are scaled by D^-0.5 whatever `scale` the attention uses.",
    ),
    example={"query_clusters": 8, "key_clusters": 12, "top_p": 0.5, "iterations": 3, "block": 32},
    exact=lambda n: {"top_p": 1.0, "query_clusters": 8, "key_clusters": 8},  # noqa: ARG005
    ladder=lambda n: tuple(
        {
            "top_p": p, "least": least, "query_clusters": max(n // 64, 2), "key_clusters": max(n // 32, 2),
            "block": min(64, max(n // 32, 1)), "iterations": 10,
        }
        for p, least in ((0.25, 0.05), (0.5, 0.1), (0.75, 0.2), (0.9, 0.4))
    ),
)  # fmt: skip
@dataclass(frozen=True)
class SVG2(RegionSelector):
    """P_ij = n_j exp(q_i . k_j / sqrt(D)) / sum_l n_l exp(q_i . k_l / sqrt(D)) for centroids q_i, k_j, n_j keys in j.

    Queries and keys of each head are clustered by k-means on their own. A cluster of queries attends to the clusters
    of keys with the largest P, up to and with the one at which their sum passes `top_p`, and to a share `least` of all
    clusters whatever they hold. Text is not clustered; it sees and is seen by all. Tokens of a cluster are moved
    together, so that dense blocks are computed.

    Args:
        query_clusters: Clusters of queries.
        key_clusters: Clusters of keys.
        top_p: Mass of P that a cluster of queries keeps at least.
        least: Fraction of the key clusters that is always kept.
        iterations: Iterations of k-means.
        seed: Draws the tokens that start k-means.
        block: Block size of the layout: changes the work, never the result.
    """

    query_clusters: int = 100
    key_clusters: int = 500
    top_p: float = 0.9
    least: float = 0.1
    iterations: int = 50
    seed: int = 0
    block: int = 64

    def __post_init__(self) -> None:
        require(self.query_clusters >= 1, "query_clusters", self.query_clusters, "at least 1 cluster")
        require(self.key_clusters >= 1, "key_clusters", self.key_clusters, "at least 1 cluster")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a fraction in (0, 1]")
        require(0 <= self.least <= 1, "least", self.least, "a fraction in [0, 1]")
        require(self.iterations >= 1, "iterations", self.iterations, "at least 1")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry) -> Plan:
        """Clusters of queries and the clusters of keys they read."""
        grid_of(q, k, geometry)
        rows, row_centroids = self._clusters(q, self.query_clusters, geometry)
        columns, column_centroids = self._clusters(k, self.key_clusters, geometry)
        sizes = columns.sizes[..., : self.key_clusters].repeat_interleave(q.shape[1] // k.shape[1], 1)
        chosen = keep_text(self._top(head_scores(row_centroids, column_centroids), sizes, q.shape[3]), rows, columns)
        return Plan(rows, columns, regions_layout(chosen, rows, columns, self.block))

    def _clusters(self, x: Tensor, clusters: int, geometry: Geometry) -> tuple[Regions, Tensor]:
        """Clusters of the grid's tokens, text behind them, and their centroids `[B, heads, K, D]`."""
        cells = x[:, :, geometry.prefix : x.shape[2] - geometry.suffix]
        regions = from_cells(kmeans(cells, clusters, self.iterations, self.seed), clusters, geometry)
        return regions, regions.means(regions.move(x))[:, :, :clusters]

    def _top(self, scores: Tensor, sizes: Tensor, dim: int) -> Tensor:
        """The clusters of keys kept, bool like `scores` `[B, H, Q, K]`, from those and the keys per cluster."""
        weighted = scores * dim**-0.5 + sizes.to(scores.dtype).log()[:, :, None]
        mass, order = weighted.softmax(-1).sort(-1, descending=True)
        before = torch.nn.functional.pad(mass.cumsum(-1)[..., :-1], (1, 0))
        first = torch.arange(order.shape[-1], device=order.device) < int(self.least * order.shape[-1])
        kept = (before <= self.top_p) | first | (self.top_p == 1)
        return torch.zeros_like(kept).scatter_(-1, order, kept)
