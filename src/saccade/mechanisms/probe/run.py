"""Feeding probes: softmax weights of one layer, computed in bounded chunks of queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from saccade.mechanisms.base import PLAIN, Probe
from saccade.ops.checks import accumulation_dtype, check_qkv, check_segments, resolve_scale
from saccade.types import Geometry

WORKSPACE = 64 * 2**20
"""Bytes that the weights of one chunk may take, unless said otherwise."""


@torch.no_grad()
def watch(
    q: Tensor,
    k: Tensor,
    probes: Probe | Sequence[Probe],
    geometry: Geometry = PLAIN,
    layer: int = 0,
    *,
    scale: float | None = None,
    workspace: int = WORKSPACE,
) -> None:
    """Show one layer's softmax weights to `probes`; costs M x N work, but only a chunk of it in memory at a time.

    Args:
        q: `[B, H, M, D]`.
        k: `[B, G, N, D]`.
        probes: One probe, or several.
        geometry: Causality and segments.
        layer: Number of the layer, passed on.
        scale: Factor on q k^T; None means D^-0.5.
        workspace: Bytes that the weights of one chunk may take; at least one query is computed at a time.

    Raises:
        ValueError: If shapes do not fit.
    """
    watching = (probes,) if isinstance(probes, Probe) else tuple(probes)
    for first_query, weights, mask in weight_chunks(q, k, geometry, scale=scale, workspace=workspace):
        for probe in watching:
            probe.observe(weights, mask, first_query, layer)


def weight_chunks(
    q: Tensor, k: Tensor, geometry: Geometry = PLAIN, *, scale: float | None = None, workspace: int = WORKSPACE
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Chunks `(first query, weights [B, H, m, N], mask [B or 1, 1, m, N])` in order; arguments as for `watch`.

    Weights are at least fp32; masked pairs and rows that see nothing are 0.
    """
    check_qkv(q, k, k)
    check_segments(q, k, geometry.q_segments, geometry.kv_segments)
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    accumulate = accumulation_dtype(q.dtype)
    row_bytes = 2 * batch * heads * max(keys, 1) * accumulate.itemsize
    rows = max(1, workspace // max(row_bytes, 1))
    wide_keys = k.to(accumulate).mT
    for first in range(0, queries, rows):
        chunk = q[:, :, first : first + rows].to(accumulate) * resolve_scale(scale, q.shape[3])
        scores = chunk.unflatten(1, (groups, -1)).flatten(2, 3) @ wide_keys
        scores = scores.view(batch, heads, chunk.shape[2], keys)
        mask = _mask(queries, keys, first, chunk.shape[2], geometry, q.device)
        hidden = ~mask
        weights = scores.masked_fill(hidden, torch.finfo(accumulate).min).softmax(-1).masked_fill(hidden, 0.0)
        yield first, weights, mask


def _mask(queries: int, keys: int, first: int, rows: int, geometry: Geometry, device: torch.device) -> Tensor:
    """Bool `[B or 1, 1, rows, N]` of causality and segments for queries `first ...`."""
    place = torch.arange(first, first + rows, device=device)[:, None] + keys - queries
    mask = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=device)
    if geometry.causal:
        mask = mask & (torch.arange(keys, device=device) <= place)
    if geometry.q_segments is not None and geometry.kv_segments is not None:
        ids = geometry.q_segments[:, first : first + rows]
        same = (ids[:, :, None] == geometry.kv_segments[:, None]) & (ids >= 0)[:, :, None]
        mask = mask & same[:, None]
    return mask


def require_next(name: str, first_query: int, seen: int, layer: int) -> None:
    """Refuse chunks that repeat or skip queries of a layer.

    Args:
        name: Of the probe.
        first_query: Where the chunk begins.
        seen: Queries of this layer seen so far.
        layer: Its number.

    Raises:
        ValueError: If the chunk does not begin where the last one ended.
    """
    if first_query != seen:
        raise ValueError(
            f"first_query={first_query}: expected {seen}, the next query of layer {layer} that {name} has not seen; "
            "use a new probe for other inputs"
        )
