"""Rectified SpaAttn: what sparse attention takes from the rest of the map is given back, from pooled weights."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import PLAIN, require, require_pattern
from saccade.mechanisms.where._blocks import head_scores
from saccade.mechanisms.where._regions import (
    Plan,
    Regions,
    RegionSelector,
    attend_moved,
    curve_blocks,
    grid_of,
    keep_text,
    regions_layout,
)
from saccade.ops.checks import accumulation_dtype, check_qkv, check_segments, resolve_scale
from saccade.ops.dispatch import RunRecord, is_recording, record
from saccade.types import Geometry, Kind, Pattern


class Pooled(NamedTuple):
    """What the pooled queries and keys say of the map between R blocks of the grid."""

    weights: Tensor
    """Share of each block, `[B, H, R, R]`, and of all text, `[B, H, R, 1]`, in one: `[B, H, R, R + 1]`."""
    restored: Tensor
    """Blocks whose pooled weight is worth more than its error, bool `[B, H, R, R]`."""


@register(
    "rectified",
    Kind.SELECTOR,
    summary="Top blocks by pooled weights; their output gets its true share, pooled values the rest.",
    papers=("Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",),
    year=2025,
    code="BienLuky/Rectified-SpaAttn",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa"}),
    training_free=True,
    exact_when="top_p = 1",
    complexity="N^2",
    deviations=(
        (
            "Blocks follow the Hilbert curve of the smallest enclosing cube, not its generalisation to boxes "
            "(Gilbert); on grids that are not cubes of a power of two they are not the authors' blocks."
        ),
        (
            "A last block that is not full has the mean, the weight and the error of its own tokens; the authors pad "
            "it with zeros."
        ),
        (
            "Text is a share of the map however much there is; the authors' Wan models, without text, take the same "
            "weights. Their keeping of the first frame's blocks among themselves for Wan is left out."
        ),
        "No log-sum-exp is returned: rectified weights are not those of a softmax over the kept pairs.",
    ),
    example={"top_p": 0.3, "least": 0.1, "block": 16},
    exact=lambda n: {"top_p": 1.0, "block": 16},  # noqa: ARG005
    ladder=lambda n: tuple(
        {"top_p": p, "least": least, "neighbors": False, "block": min(64, max(n // 32, 1))}
        for p, least in ((0.1, 0.05), (0.3, 0.1), (0.6, 0.2), (0.9, 0.5))
    ),
)
@dataclass(frozen=True)
class Rectified(RegionSelector):
    """Pooled weights p_ij = n_j exp(q_i . k_j s) / (sum_l n_l exp(q_i . k_l s) + sum_t exp(q_i . k_t s)).

    q_i, k_j are means of blocks of the grid, n_j the tokens of block j, t the tokens of text, s the scale; the shares
    of all text are one entry (isolated-pooling attention reallocation). Block i attends to the blocks j with the
    largest p, up to and with the one at which their sum passes `top_p`, to a fraction `least` of all at least, to
    blocks that touch it on the grid and to text. Of the others those are restored whose gain |q_i . k_j| is larger
    than the error of pooling, |d(q)_i . k_j| + |q_i . d(k)_j| with d the mean absolute deviation of a block per
    channel (gain-aware pooling rectification). The output is

        (1 - sum of restored p_ij) * softmax attention over the kept pairs + sum of restored p_ij mean(v_j).

    Text attends to everything, exactly.

    Args:
        top_p: Share of the pooled weights that a block keeps at least.
        least: Fraction of the blocks that is always kept.
        neighbors: Keep blocks that hold a cell next to (or diagonal to) one of the block's own.
        block: Tokens per block.
    """

    adds = True

    top_p: float = 0.3
    least: float = 0.2
    neighbors: bool = True
    block: int = 128

    def __post_init__(self) -> None:
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a share in (0, 1]")
        require(0 <= self.least <= 1, "least", self.least, "a fraction in [0, 1]")
        require(self.block >= 1, "block", self.block, "at least 1 token")

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry) -> Plan:
        """Blocks along the Hilbert curve, and those that are attended to exactly."""
        regions = self._regions(q, k, geometry)
        pooled = self._pool(regions.move(q), regions.move(k), regions, q.shape[3] ** -0.5)
        return self._plan(regions, self._choose(regions, pooled, grid_of(q, k, geometry), geometry.prefix))

    def _regions(self, q: Tensor, k: Tensor, geometry: Geometry) -> Regions:
        return curve_blocks(grid_of(q, k, geometry), self.block, geometry, q.device)

    def _pool(self, q: Tensor, k: Tensor, regions: Regions, scale: float) -> Pooled:
        """The pooled map of moved q and k."""
        count = regions.count - regions.text
        cells = int(regions.sizes[..., :count].sum())
        q_mean, k_mean = (regions.means(x)[:, :, :count] for x in (q, k))
        q_spread, k_spread = (self._spread(x, regions)[:, :, :count] for x in (q, k))
        raw = head_scores(q_mean, k_mean)
        error = head_scores(q_spread, k_mean).abs() + head_scores(q_mean, k_spread).abs()
        sizes = regions.sizes[..., None, :count].to(raw.dtype)
        text = head_scores(q_mean, k[:, :, cells:].to(raw.dtype)) * scale
        weights = torch.cat([raw * scale + sizes.log(), text], -1).softmax(-1)
        weights = torch.cat([weights[..., :count], weights[..., count:].sum(-1, keepdim=True)], -1)
        return Pooled(weights, raw.abs() > error)

    @staticmethod
    def _spread(x: Tensor, regions: Regions) -> Tensor:
        """Mean absolute deviation of each region's tokens from their mean, per channel."""
        x = x.to(accumulation_dtype(x.dtype))
        own = regions.labels[..., None].expand(*x.shape[:2], -1, x.shape[3])
        return regions.means((x - regions.means(x).gather(2, own)).abs())

    def _choose(self, regions: Regions, pooled: Pooled, grid: tuple[int, ...], prefix: int) -> Tensor:
        """The blocks that each block attends to exactly, bool `[B, H, R, R]`."""
        mass, order = pooled.weights.detach().sort(-1, descending=True)
        count = regions.count - regions.text
        before = torch.nn.functional.pad(mass.cumsum(-1)[..., :-1], (1, 0))
        first = torch.arange(order.shape[-1], device=order.device) < int(self.least * count)
        kept = (before <= self.top_p) | first | (self.top_p == 1)
        chosen = torch.zeros_like(kept).scatter_(-1, order, kept)[..., :count]
        if not self.neighbors:
            return chosen
        cells = regions.labels[0, 0][regions.order[0, 0].argsort()][prefix : prefix + math.prod(grid)]
        return chosen | _touching(cells.view(grid), count)

    def _plan(self, regions: Regions, chosen: Tensor) -> Plan:
        return Plan(regions, regions, regions_layout(keep_text(chosen, regions, regions), regions, regions, self.block))

    def __call__(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, scale: float | None = None,
        return_lse: bool = False, impl: str = "auto",
    ) -> Tensor:  # fmt: skip
        """As for every selector, without `return_lse`."""
        check_qkv(q, k, v)
        check_segments(q, k, geometry.q_segments, geometry.kv_segments)
        require_pattern(self.card, q, k, geometry)
        require(not return_lse, "return_lse", return_lse, "False: rectified weights have no log-sum-exp")
        started = time.perf_counter()
        regions = self._regions(q, k, geometry)
        pooled = self._pool(regions.move(q), regions.move(k), regions, resolve_scale(scale, q.shape[3]))
        chosen = self._choose(regions, pooled, grid_of(q, k, geometry), geometry.prefix)
        plan = self._plan(regions, chosen)
        if is_recording():
            record(RunRecord("select", self.card.name, select_seconds=time.perf_counter() - started))
        exact: Any = attend_moved(q, k, v, plan, scale=scale, impl=impl)
        given = pooled.weights[..., : chosen.shape[-1]].masked_fill(chosen | ~pooled.restored, 0.0)
        return _rectify(exact, v, given, regions)


def _rectify(exact: Tensor, v: Tensor, given: Tensor, regions: Regions) -> Tensor:
    """The exact part without the share `given` `[B, H, R, R]` to blocks, and those blocks' mean values in its place."""
    values = regions.means(regions.move(v))[:, :, : given.shape[3]]
    shares = head_scores(given, values.mT)
    tokens = torch.cat([1 - given.sum(-1, keepdim=True), shares], -1)
    kept = torch.zeros_like(tokens[:, :, :1])  # text: all of the exact part, nothing else
    kept[..., 0] = 1
    tokens = torch.cat([tokens, kept], 2) if regions.text else tokens
    tokens = tokens.gather(2, regions.labels[..., None].expand(*tokens.shape[:2], -1, tokens.shape[3]))
    tokens = regions.restore(tokens)
    return (exact * tokens[..., :1] + tokens[..., 1:]).to(exact.dtype)


def _touching(labels: Tensor, count: int) -> Tensor:
    """Which regions hold neighbouring cells of the grid, diagonal ones and themselves included: bool `[R, R]`."""
    near = torch.eye(count, dtype=torch.bool, device=labels.device)
    for step in itertools.product((-1, 0, 1), repeat=labels.ndim):
        here = labels[tuple(slice(max(-s, 0), n - max(s, 0)) for s, n in zip(step, labels.shape, strict=True))]
        there = labels[tuple(slice(max(s, 0), n - max(-s, 0)) for s, n in zip(step, labels.shape, strict=True))]
        near[here.flatten(), there.flatten()] = True
    return near
