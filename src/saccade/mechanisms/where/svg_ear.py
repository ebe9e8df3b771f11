"""SVG-EAR: cluster pairs whose centroids would err most are computed, all others stand by their centroids."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import PLAIN, require, require_pattern
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
from saccade.mechanisms.where._weighted import attend_weighted
from saccade.ops import block_attend, merge
from saccade.ops.checks import accumulation_dtype, check_qkv, check_segments, resolve_scale
from saccade.ops.dispatch import RunRecord, is_recording, record
from saccade.types import AttentionOutput, Geometry, Kind, Pattern


class Routing(NamedTuple):
    """The clusters, and which pairs of them are computed."""

    rows: Regions
    columns: Regions
    chosen: Tensor
    """Bool `[B, H, Q, K]`, without text."""


@register(
    "svg_ear",
    Kind.SELECTOR,
    summary="Clusters of queries and keys; pairs with the most error per cost are computed, the others by centroid.",
    papers=("SVG-EAR: Parameter-Free Linear Compensation for Sparse Video Generation via Error-aware Routing",),
    year=2026,
    code="svg-project/Sparse-VideoGen",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "lse"}),
    training_free=True,
    exact_when="density = 1",
    complexity="N^2",
    deviations=(
        (
            "The authors' code is not public. The rule is that of their abstract and project page; the estimated "
            "error is the one that their bound on the error of the attention map sums, with a query cluster's centroid "
            "in the place of its queries. The number of clusters is that of SVG2."
        ),
        (
            "Pairs are taken in the order of error per cost while they fit the budget of the head; whether the "
            "authors pass over one that does not fit is not said. Here the first such pair ends it."
        ),
        "K-means is that of `svg2`: anew in every call, from tokens drawn by `seed`.",
        (
            "The error is estimated from the weights alone and with a table of query clusters x keys; the authors "
            "stream it. It is scaled by D^-0.5 whatever `scale` the attention uses."
        ),
    ),
    example={"query_clusters": 6, "key_clusters": 12, "density": 0.5, "iterations": 3, "block": 32},
    exact=lambda n: {"density": 1.0, "query_clusters": 8, "key_clusters": 8},  # noqa: ARG005
    ladder=lambda n: tuple(
        {
            "density": kept, "query_clusters": max(n // 64, 2), "key_clusters": max(n // 32, 2),
            "block": min(64, max(n // 32, 1)), "iterations": 10,
        }
        for kept in (0.05, 0.1, 0.25, 0.5)
    ),
)  # fmt: skip
@dataclass(frozen=True)
class SVGEAR(RegionSelector):
    """A query q attends to the keys of the chosen clusters, and to a cluster c of the others as n_c keys k_c.

    out = (sum_j exp(q . k_j s) v_j + sum_c n_c exp(q . k_c s) v_c) / (sum_j exp(q . k_j s) + sum_c n_c exp(q . k_c s))
    with j over the keys of chosen clusters, c over the other clusters, k_c and v_c means over its n_c keys and values.

    What this does to cluster c for the queries of cluster i is estimated at their centroid q_i, as the squared error
    sum_{j in c} (exp(q_i . k_j s) - exp(q_i . k_c s))^2 / Z_i^2 with Z_i the sum over all keys. Pairs (i, c) are chosen
    by the largest error per key, n_i error / (n_i n_c), until the next would take more than `density` of all pairs.
    Text is not clustered; it sees and is seen by all.

    Args:
        query_clusters: Clusters of queries.
        key_clusters: Clusters of keys.
        density: Share of the pairs between grid tokens that may be computed, for each head.
        iterations: Iterations of k-means.
        seed: Draws the tokens that start k-means.
        block: Block size of the layout: changes the work, never the result.
    """

    adds = True

    query_clusters: int = 100
    key_clusters: int = 500
    density: float = 0.2
    iterations: int = 50
    seed: int = 0
    block: int = 64

    def __post_init__(self) -> None:
        require(self.query_clusters >= 1, "query_clusters", self.query_clusters, "at least 1 cluster")
        require(self.key_clusters >= 1, "key_clusters", self.key_clusters, "at least 1 cluster")
        require(0 <= self.density <= 1, "density", self.density, "a share in [0, 1]")
        require(self.iterations >= 1, "iterations", self.iterations, "at least 1")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry) -> Plan:
        """Clusters of queries and the clusters of keys they read exactly; the others are added by the call."""
        return self._plan(self._route(q, k, geometry))

    def _plan(self, routing: Routing) -> Plan:
        rows, columns, chosen = routing
        return Plan(rows, columns, regions_layout(keep_text(chosen, rows, columns), rows, columns, self.block))

    def _route(self, q: Tensor, k: Tensor, geometry: Geometry) -> Routing:
        """The pairs of clusters with the largest error per cost that fit the budget."""
        cells = math.prod(grid_of(q, k, geometry))
        inside = slice(geometry.prefix, geometry.prefix + cells)
        rows, columns = (
            from_cells(kmeans(x[:, :, inside], clusters, self.iterations, self.seed), clusters, geometry)
            for x, clusters in ((q, self.query_clusters), (k, self.key_clusters))
        )
        errors = self._errors(q, columns.move(k)[:, :, :cells], rows, columns)
        shared = q.shape[1] // k.shape[1]
        sizes = columns.sizes[..., : self.key_clusters].repeat_interleave(shared, 1)[:, :, None]
        cost = rows.sizes[..., : self.query_clusters, None] * sizes
        worth = (errors / sizes.clamp(min=1)).masked_fill(cost == 0, -torch.inf).flatten(2)
        order = worth.argsort(dim=-1, descending=True, stable=True)
        spent = cost.flatten(2).gather(-1, order).cumsum(-1)
        fits = (spent <= self.density * cells**2) | (self.density == 1)
        chosen = torch.zeros_like(fits).scatter_(-1, order, fits).view(errors.shape)
        return Routing(rows, columns, chosen & (cost > 0))

    def _errors(self, q: Tensor, k: Tensor, rows: Regions, columns: Regions) -> Tensor:
        """Estimated squared error of every pair of clusters, `[B, H, Q, K]`; k is moved, and without text."""
        batch, heads, count = q.shape[0], q.shape[1], self.key_clusters
        labels = columns.labels[..., : k.shape[2]].repeat_interleave(heads // k.shape[1], 1)
        grid = Regions(columns.order[..., : k.shape[2]], columns.labels[..., : k.shape[2]], count)
        probes = rows.means(rows.move(q))[:, :, : self.query_clusters] * q.shape[3] ** -0.5
        logits = head_scores(probes, k.to(accumulation_dtype(k.dtype)))  # [B, H, Q, N]
        normal = logits.logsumexp(-1, keepdim=True)
        centroids = head_scores(probes, grid.means(k)) - normal
        where = labels[:, :, None].expand(logits.shape)
        lost = ((logits - normal).exp() - centroids.exp().gather(3, where)).square()
        return lost.new_zeros(batch, heads, self.query_clusters, count).scatter_add_(3, where, lost)

    def __call__(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, scale: float | None = None,
        return_lse: bool = False, impl: str = "auto",
    ) -> Tensor | AttentionOutput:  # fmt: skip
        """As for every selector."""
        check_qkv(q, k, v)
        check_segments(q, k, geometry.q_segments, geometry.kv_segments)
        require_pattern(self.card, q, k, geometry)
        started = time.perf_counter()
        routing = self._route(q.detach(), k.detach(), geometry)
        plan = self._plan(routing)
        if is_recording():
            record(RunRecord("select", self.card.name, select_seconds=time.perf_counter() - started))
        factor = resolve_scale(scale, q.shape[3])
        q, k, v = plan.rows.move(q), plan.columns.move(k), plan.columns.move(v)
        exact = block_attend(q, k, v, plan.layout, scale=factor, return_lse=True, impl=impl)
        out, lse = merge([exact, self._compensation(q, k, v, routing, factor, impl)])
        out = plan.rows.restore(out)
        return AttentionOutput(out, plan.rows.restore(lse)) if return_lse and lse is not None else out

    def _compensation(
        self, q: Tensor, k: Tensor, v: Tensor, routing: Routing, scale: float, impl: str
    ) -> AttentionOutput:
        """Attention of moved queries to the centroids of the clusters that are not computed, each as all its keys."""
        rows, columns, chosen = routing
        count = self.key_clusters
        sizes = columns.sizes[..., :count]
        shared = chosen.shape[1] // sizes.shape[1]
        skipped = ~chosen & (sizes > 0).repeat_interleave(shared, 1)[:, :, None]
        skipped = torch.nn.functional.pad(skipped, (0, 0, 0, rows.text))  # text leaves nothing out
        place = torch.arange(count, device=q.device)[None, None]
        layout = regions_layout(skipped, rows, Regions(place, place, count), self.block)
        keys, values = (columns.means(x)[:, :, :count] for x in (k, v))
        return attend_weighted(q, keys, values, sizes.clamp(min=1), layout, scale, impl)
