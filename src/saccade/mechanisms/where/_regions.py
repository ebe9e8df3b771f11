"""Selectors that choose between regions of tokens (tiles of a grid, clusters), moved so that a region lies together."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.mechanisms.base import PLAIN, Selector, require, require_pattern
from saccade.mechanisms.where._orders import hilbert_order
from saccade.ops import block_attend
from saccade.ops.checks import accumulation_dtype, check_qkv, check_segments
from saccade.ops.dispatch import RunRecord, is_recording, record
from saccade.types import AttentionOutput, BlockLayout, Geometry
from saccade.types.bits import pack_bits
from saccade.types.layout import FULL
from saccade.types.layout_algebra import make


@dataclass(frozen=True, eq=False)
class Regions:
    """Tokens in a new order in which those of one region lie together.

    Args:
        order: int64 `[B or 1, heads or 1, N]`; place p of the moved sequence holds token `order[p]`.
        labels: int64 of the same shape; region of each place, ascending along the sequence.
        count: R, the number of regions; some may be empty.
        text: How many of the last regions hold the tokens outside the grid.
    """

    order: Tensor
    labels: Tensor
    count: int
    text: int = 0

    @property
    def sizes(self) -> Tensor:
        """Tokens per region, int64 `[B or 1, heads or 1, R]`."""
        zeros = self.labels.new_zeros(*self.labels.shape[:2], self.count)
        return zeros.scatter_add_(2, self.labels, torch.ones_like(self.labels))

    def move(self, x: Tensor) -> Tensor:
        """`[B, heads, N, C]` in the new order; heads that share x but not their order get a copy each."""
        if self.order.shape[:2] == (1, 1):
            return x.index_select(2, self.order[0, 0])
        heads = self.order.shape[1]
        if heads > x.shape[1]:
            x = x.repeat_interleave(heads // x.shape[1], 1)
        return x.gather(2, self.order[..., None].expand(*x.shape[:2], -1, x.shape[3]))

    def restore(self, x: Tensor) -> Tensor:
        """`[B, heads, N]` or `[B, heads, N, C]` back in the order of the tokens."""
        back = self.order.argsort(-1).expand(*x.shape[:2], -1)
        return x.gather(2, back if x.ndim == 3 else back[..., None].expand_as(x))

    def means(self, moved: Tensor) -> Tensor:
        """Mean of each region of moved `[B, heads, N, C]`: `[B, heads, R, C]`, at least fp32; 0 where empty."""
        batch, heads, tokens, channels = moved.shape
        first = torch.arange(batch * heads, device=moved.device).view(batch, heads, 1) * self.count
        row = (first + self.labels).expand(batch, heads, tokens).reshape(-1)
        values = moved.to(accumulation_dtype(moved.dtype)).reshape(-1, channels)
        sums = values.new_zeros(batch * heads * self.count, channels).index_add_(0, row, values)
        return sums.view(batch, heads, self.count, channels) / self.sizes.clamp(min=1)[..., None]


def grid_of(q: Tensor, k: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """Sizes of the grid that queries and keys lie on; without `geometry.grid` one axis of all tokens."""
    queries, keys = q.shape[2], k.shape[2]
    require(queries == keys, "queries", queries, f"{keys}, as many as keys")
    grid = (keys,) if geometry.grid is None else geometry.grid
    inside = math.prod(grid) + geometry.prefix + geometry.suffix
    expected = f"{inside}, the tokens of grid={grid} with prefix={geometry.prefix}, suffix={geometry.suffix}"
    require(inside == keys, "tokens", keys, expected)
    return grid


def from_cells(labels: Tensor, count: int, geometry: Geometry) -> Regions:
    """Regions of the grid's cells, int64 `[B or 1, heads or 1, cells]`; text goes to the end, one region of its own."""
    order = labels.argsort(dim=-1, stable=True)
    return _with_text(order, labels.gather(-1, order), count, geometry)


def _with_text(order: Tensor, labels: Tensor, count: int, geometry: Geometry) -> Regions:
    """Regions of cells moved to `order`, and of the text behind them."""
    text = geometry.prefix + geometry.suffix
    if not text:
        return Regions(order, labels, count)
    cells = labels.shape[-1]
    total = cells + text
    outside = torch.cat([torch.arange(geometry.prefix), torch.arange(total - geometry.suffix, total)]).to(order.device)
    outside = outside.expand(*order.shape[:2], -1)
    order = torch.cat([order + geometry.prefix, outside], -1)
    return Regions(order, torch.cat([labels, torch.full_like(outside, count)], -1), count + 1, text=1)


def curve_blocks(grid: tuple[int, ...], size: int, geometry: Geometry, device: torch.device) -> Regions:
    """Runs of `size` cells along the Hilbert curve, the last one shorter, in the order of the curve."""
    order = hilbert_order(grid, device) if len(grid) > 1 else torch.arange(grid[0], device=device)
    labels = torch.arange(len(order), device=device) // size
    return _with_text(order[None, None], labels[None, None], -(-len(order) // size), geometry)


def tiles(grid: tuple[int, ...], tile: tuple[int, ...], geometry: Geometry, device: torch.device) -> Regions:
    """The grid cut into tiles of the given sizes, in row-major order, those at the far borders cut short."""
    label, count = torch.zeros(1, dtype=torch.int64, device=device), 1
    for size, step in zip(grid, tile, strict=True):
        along = torch.arange(size, device=device) // step
        number = -(-size // step)
        label, count = (label[:, None] * number + along).flatten(), count * number
    return from_cells(label[None, None], count, geometry)


def keep_text(chosen: Tensor, rows: Regions, columns: Regions) -> Tensor:
    """Widen choices between grid regions, bool `[..., R, C]` without text, by text that sees and is seen by all."""
    return torch.nn.functional.pad(chosen, (0, columns.text, 0, rows.text), value=True)


def regions_layout(chosen: Tensor, rows: Regions, columns: Regions, block: int) -> BlockLayout:
    """The layout, in moved order, in which the tokens of region r read those of the regions where `chosen[r]`.

    Args:
        chosen: Bool `[B or 1, H or 1, R, C]`.
        rows: Of the queries.
        columns: Of the keys; with fewer heads than `chosen` several of its heads share theirs.
        block: Block size in tokens. Blocks that several regions meet in are bit-masked where these disagree.

    Returns:
        The layout; nothing larger than regions x regions and blocks x blocks is formed.
    """
    q_labels, k_labels, k_sizes = rows.labels, columns.labels, columns.sizes
    if 1 < k_labels.shape[1] < chosen.shape[1]:
        shared = chosen.shape[1] // k_labels.shape[1]
        k_labels, k_sizes = (x.repeat_interleave(shared, 1) for x in (k_labels, k_sizes))
    q_there, k_there = rows.sizes > 0, k_sizes > 0
    chosen = chosen & q_there[..., None] & k_there[..., None, :]
    found = _sums_over_blocks(_sums_over_blocks(chosen, q_labels, block).mT, k_labels, block).mT
    possible = (
        _sums_over_blocks(q_there[..., None], q_labels, block)
        * _sums_over_blocks(k_there[..., None], k_labels, block).mT
    )
    queries, keys = q_labels.shape[-1], k_labels.shape[-1]
    full, some = (found > 0) & (found == possible), (found > 0) & (found < possible)
    first, last = _ends(k_labels, block)
    single = (first == last)[..., None, :]
    layout = _whole_columns(chosen, q_labels, full, some & single, first, block, keys)
    mixed = some & ~single
    if not bool(mixed.any()):
        return layout

    def pairs(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = q_labels[b % q_labels.shape[0], h % q_labels.shape[1], i]
        column = k_labels[b % k_labels.shape[0], h % k_labels.shape[1], j]
        return chosen[b % chosen.shape[0], h % chosen.shape[1], row, column]

    candidates = BlockLayout.from_block_mask(mixed, block, block, queries, keys)
    return layout | BlockLayout.from_mask_mod(
        pairs, queries, keys, batch=candidates.batch, heads=candidates.heads, block=block, candidates=candidates
    )  # fmt: skip


def _ends(labels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Regions of the first and of the last token of every block: `[B or 1, heads or 1, blocks]` each."""
    first = torch.arange(0, labels.shape[-1], block, device=labels.device)
    return labels[..., first], labels[..., (first + block - 1).clamp(max=labels.shape[-1] - 1)]


def _whole_columns(
    chosen: Tensor, q_labels: Tensor, full: Tensor, some: Tensor, region: Tensor, block: int, keys: int
) -> BlockLayout:
    """The layout of full blocks, and of those whose keys are all of one `region`, so that whole rows are masked.

    The masks of such blocks differ by (block of queries, region) alone, so that few are stored.
    """
    batch, heads, query_blocks, _ = full.shape
    entries = (full | some).nonzero()
    b, h, i, j = some.nonzero().unbind(1)
    column = region[b % region.shape[0], h % region.shape[1], j]
    code = ((b * heads + h) * query_blocks + i) * chosen.shape[3] + column
    distinct, which = torch.unique(code, return_inverse=True)
    row, column = distinct // chosen.shape[3], distinct % chosen.shape[3]
    b, h, i = row // (heads * query_blocks), row // query_blocks % heads, row % query_blocks
    token = (i[:, None] * block + torch.arange(block, device=chosen.device)).clamp(max=q_labels.shape[-1] - 1)
    b, h = b[:, None], h[:, None]
    label = q_labels[b % q_labels.shape[0], h % q_labels.shape[1], token]
    rows = chosen[b % chosen.shape[0], h % chosen.shape[1], label, column[:, None]]
    bits = [pack_bits(part[..., None].expand(-1, -1, block)) for part in rows.split(max(1, 2**24 // block**2))]
    kinds = torch.full(full.shape, FULL, device=chosen.device)
    kinds[some] = which
    sizes = {"batch": batch, "heads": heads, "queries": q_labels.shape[-1], "keys": keys, "block": (block, block)}
    place = (entries[:, 0] * heads + entries[:, 1]) * query_blocks + entries[:, 2]
    return make(place, entries[:, 3], kinds[tuple(entries.T)].int(), torch.cat(bits), sizes)


def _sums_over_blocks(values: Tensor, labels: Tensor, block: int) -> Tensor:
    """Sums of `[..., R, C]` over the regions that each block of tokens spans: int32 `[..., blocks, C]`."""
    low, high = _ends(labels, block)
    running = torch.nn.functional.pad(values.cumsum(-2, dtype=torch.int32), (0, 0, 1, 0))
    shape = (*torch.broadcast_shapes(running.shape[:2], labels.shape[:2]), low.shape[-1], running.shape[-1])
    running = running.expand(*shape[:2], -1, -1)
    return running.gather(2, (high[..., None] + 1).expand(shape)) - running.gather(2, low[..., None].expand(shape))


class Plan(NamedTuple):
    """How queries and keys are moved, and what is computed, in moved order."""

    rows: Regions
    columns: Regions
    layout: BlockLayout


class RegionSelector(Selector):
    """Selectors that move tokens first, choose and attend in the moved order, and move the output back.

    `select` and `pattern` return the layout in the moved order; `plan` says what that is.
    """

    @abstractmethod
    def plan(self, q: Tensor, k: Tensor, geometry: Geometry) -> Plan:
        """The orders of queries and keys, and the layout between them."""

    def plan_with_values(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Plan:  # noqa: ARG002
        """The plan of a call, for the few whose choice also looks at the values `[B, G, N, E]`."""
        return self.plan(q, k, geometry)

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout:
        """The pairs to compute, in the moved order."""
        return self.plan(q, k, geometry).layout

    def __call__(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, scale: float | None = None,
        return_lse: bool = False, impl: str = "auto",
    ) -> Tensor | AttentionOutput:  # fmt: skip
        """As for every selector."""
        check_qkv(q, k, v)
        check_segments(q, k, geometry.q_segments, geometry.kv_segments)
        require_pattern(self.card, q, k, geometry)
        started = time.perf_counter()
        plan = self.plan_with_values(q.detach(), k.detach(), v.detach(), geometry)
        if is_recording():
            record(RunRecord("select", self.card.name, select_seconds=time.perf_counter() - started))
        return attend_moved(q, k, v, plan, scale=scale, return_lse=return_lse, impl=impl)


def attend_moved(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, return_lse: bool = False, **options: Any) -> Any:
    """Attention over the plan's pairs: out `[B, H, M, E]`, or `AttentionOutput` with `return_lse`."""
    moved = plan.rows.move(q), plan.columns.move(k), plan.columns.move(v)
    out, lse = block_attend(*moved, plan.layout, return_lse=True, **options)
    out = plan.rows.restore(out)
    return AttentionOutput(out, plan.rows.restore(lse)) if return_lse else out
