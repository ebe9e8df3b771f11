"""The portable implementation: lists of keys gathered into dense tiles, as many at a time as the workspace holds.

A tile is one group of queries of one head, or, where the heads that share a key/value head also share the lists, of
all these heads stacked in the query axis, so that each list is gathered once per key/value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.ops.checks import accumulation_dtype
from saccade.ops.tile import tile_forward, tile_gradients

CPU_CACHE = 8 * 2**20
"""On CPUs tiles that stay in cache are faster."""


@dataclass(frozen=True)
class Lists:
    """The pattern of one call: `indices` `[B or 1, 1, G or H, ceil(M / group), K]`, the sizes, and the score rules."""

    indices: Tensor
    group: int
    causal: bool
    queries: int
    keys: int
    batch: int
    heads: int
    kv_heads: int
    softcap: float | None
    scale: float
    workspace: int

    @property
    def tile_heads(self) -> int:
        """Heads that need tiles of their own."""
        return self.kv_heads if self.indices.shape[1] in (1, self.kv_heads) else self.heads

    @property
    def groups(self) -> int:
        """Lists per head."""
        return self.indices.shape[2]

    def stack(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """`[B, H, M, .]` as tiles `[B * tile_heads * groups, H / tile_heads * group, .]`, ragged ends filled."""
        pad = self.groups * self.group - self.queries
        x = torch.nn.functional.pad(x, (0, 0, 0, pad), value=fill) if pad else x
        share = self.heads // self.tile_heads
        x = x.reshape(self.batch, self.tile_heads, share, self.groups, self.group, x.shape[-1])
        return x.transpose(2, 3).reshape(self.batch * self.tile_heads * self.groups, share * self.group, x.shape[-1])

    def unstack(self, tiles: Tensor) -> Tensor:
        """The inverse of `stack`."""
        share = self.heads // self.tile_heads
        x = tiles.view(self.batch, self.tile_heads, self.groups, share, self.group, tiles.shape[-1]).transpose(2, 3)
        return x.reshape(self.batch, self.heads, self.groups * self.group, tiles.shape[-1])[:, :, : self.queries]

    def tiles(self, dim: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Chunks of tiles that fit the workspace.

        Args:
            dim: D + E.
            dtype: Of the inputs.

        Yields:
            The tiles, the rows of `[B * G * N, .]` they gather int64 `[n, K]`, and their mask bool
            `[n, group or 1, K]`, the same for every head of the stack.
        """
        total, length = self.batch * self.tile_heads * self.groups, self.indices.shape[3]
        if length == 0 or self.keys == 0:
            return
        rows = self.heads // self.tile_heads * self.group
        tile_bytes = length * (3 * dim + 4 * rows) * accumulation_dtype(dtype).itemsize
        workspace = min(self.workspace, CPU_CACHE) if self.indices.device.type == "cpu" else self.workspace
        step = max(1, workspace // max(tile_bytes, 1))
        for start in range(0, total, step):
            tile = torch.arange(start, min(start + step, total), device=self.indices.device)
            group, head, batch = tile % self.groups, tile // self.groups % self.tile_heads, tile // self.groups
            batch = batch // self.tile_heads
            chosen = self.indices[
                batch if self.indices.shape[0] > 1 else 0, head if self.indices.shape[1] > 1 else 0, group
            ]
            kv_row = batch * self.kv_heads + head // (self.tile_heads // self.kv_heads)
            gathered = chosen.clamp(min=0) + (kv_row * self.keys)[:, None]
            yield slice(start, start + len(tile)), gathered, self._mask(chosen, group)

    def _mask(self, chosen: Tensor, group: Tensor) -> Tensor:
        """Bool `[n, m or 1, K]`: filled slots that causality leaves."""
        mask = (chosen >= 0)[:, None]
        if not self.causal:
            return mask
        member = torch.arange(self.group, device=chosen.device)
        place = group[:, None] * self.group + member + self.keys - self.queries
        return mask & (chosen[:, None] <= place[..., None])


def check_range(indices: Tensor, keys: int) -> None:
    """Refuse lists that point outside."""
    if indices.numel():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < -1 or high >= keys:
            raise ValueError(f"index.indices in [{low}, {high}]: expected -1 or positions in [0, {keys})")


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lists: Lists, poison: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`out` `[B, H, M, E]` in q's dtype and `lse` `[B, H, M]`; NaN where `poison` `[B, G, N, E]` marks a value."""
    dtype = accumulation_dtype(q.dtype)
    tiles, keys, values = lists.stack(q), k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3])
    out = q.new_zeros(*tiles.shape[:2], v.shape[3], dtype=dtype)
    lse = q.new_full(tiles.shape[:2], -torch.inf, dtype=dtype)
    for part, gathered, mask in lists.tiles(k.shape[3] + v.shape[3], q.dtype):
        out[part], lse[part] = tile_forward(
            tiles[part], _rows(keys, gathered), _rows(values, gathered), mask, lists.scale, lists.softcap
        )
        if poison is not None:
            seen = mask.to(dtype) @ _rows(poison.reshape(keys.shape[0], -1).to(dtype), gathered) > 0
            out[part] = out[part].masked_fill(seen.repeat(1, tiles.shape[1] // seen.shape[1], 1), torch.nan)
    out, lse = lists.unstack(out), lists.unstack(lse[..., None])[..., 0]
    if sinks is not None:
        joint = torch.logaddexp(lse, sinks.to(dtype)[:, None])
        out, lse = out * torch.exp(lse - joint.masked_fill(joint == -torch.inf, 0.0))[..., None], joint
    return out.to(q.dtype).contiguous(), lse.contiguous()


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor,
    lse: Tensor, lists: Lists,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and sinks, in their dtypes."""
    dtype = accumulation_dtype(q.dtype)
    delta = torch.linalg.vecdot(grad_out.to(dtype), out.to(dtype))
    if grad_lse is not None:
        delta = delta - torch.where(lse == -torch.inf, 0.0, grad_lse.to(dtype))
    keys, values = k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3])
    tiles, grads, deltas = lists.stack(q), lists.stack(grad_out), lists.stack(delta[..., None])[..., 0]
    rows = lists.stack(lse[..., None], fill=-torch.inf)[..., 0]
    dq = torch.zeros_like(tiles, dtype=dtype)
    dk, dv = torch.zeros_like(keys, dtype=dtype), torch.zeros_like(values, dtype=dtype)
    for part, gathered, mask in lists.tiles(k.shape[3] + v.shape[3], q.dtype):
        dq[part], dkeys, dvalues = tile_gradients(
            grads[part], deltas[part], tiles[part], _rows(keys, gathered), _rows(values, gathered), mask, rows[part],
            lists.scale, lists.softcap,
        )  # fmt: skip
        _add_rows(dk, gathered, dkeys)
        _add_rows(dv, gathered, dvalues)
    dsinks = None
    if sinks is not None:
        share = torch.exp(sinks.to(dtype)[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf))
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    dq = lists.unstack(dq).to(q.dtype).contiguous()
    return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), dsinks


def sees(flags: Tensor, lists: Lists) -> Tensor:
    """Bool `[B, H, M]`: does a query see a key that is marked in bool `[B, G, N]`."""
    some = torch.zeros(
        lists.batch * lists.tile_heads * lists.groups,
        lists.heads // lists.tile_heads * lists.group,
        dtype=torch.bool,
        device=flags.device,
    )
    for part, gathered, mask in lists.tiles(1, torch.float32):
        seen = (mask & flags.flatten()[gathered][:, None]).any(-1)
        some[part] = seen.repeat(1, some.shape[1] // seen.shape[1])
    return lists.unstack(some[..., None])[..., 0]


def seen_by(flags: Tensor, lists: Lists) -> Tensor:
    """Bool `[B, G, N]`: is a key seen by a query that is marked in bool `[B, H, M]`."""
    marked = lists.stack(flags[..., None])[..., 0]
    some = torch.zeros(lists.batch * lists.kv_heads * lists.keys, dtype=torch.bool, device=flags.device)
    for part, gathered, mask in lists.tiles(1, torch.float32):
        rows = marked[part].view(len(gathered), -1, lists.group).any(1)
        some[gathered[(mask & rows[..., None]).any(1)]] = True
    return some.view(lists.batch, lists.kv_heads, lists.keys)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`, which `index_select` gathers faster on CPUs: `[n, K, .]`."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, x.shape[1])


def _add_rows(total: Tensor, rows: Tensor, parts: Tensor) -> None:
    """`total[rows] += parts` with repeats, in a fixed order: on GPUs only `index_put_` has one, it sorts."""
    if total.device.type == "cpu":
        total.scatter_add_(0, rows.flatten()[:, None].expand(-1, total.shape[1]), parts.flatten(0, 1))
    else:
        total.index_put_((rows.flatten(),), parts.flatten(0, 1), accumulate=True)
