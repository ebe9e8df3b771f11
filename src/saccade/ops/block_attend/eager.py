"""`block_attend` in portable PyTorch: batches of query blocks over gathered key blocks, within a bounded workspace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.ops.block_attend.fused import can_fuse, fused_forward, fused_gradients
from saccade.ops.block_attend.pieces import Masks, Piece, Sharing, pieces
from saccade.ops.checks import accumulation_dtype
from saccade.ops.tile import tile_forward, tile_gradients
from saccade.types import BlockLayout

CACHE = 8 * 2**20
"""Bytes a CPU works on at a time: small enough to stay in its cache, large enough to need few parallel regions."""


def eager_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, softcap: float | None, workspace: int
) -> tuple[Tensor, Tensor]:
    """Out `[B, H, M, E]` and lse `[B, H, M]`, both in the accumulation dtype; layout and inputs are checked already."""
    if finite(k) and finite(v):
        return _forward(q, k, v, layout, scale, softcap, workspace)
    bad, poison = ~torch.isfinite(k).all(-1, keepdim=True), ~torch.isfinite(v)
    v = v.masked_fill(poison, 0)  # 0 * NaN is NaN
    out, lse = _forward(q, k.masked_fill(bad, 0), v, layout, scale, softcap, workspace)
    bad_row = sees(bad, layout, q.shape[1], workspace)
    if bool(bad_row.any()):  # their scores are what the bad keys give
        true_out, true_lse = _forward(q, k, v, layout, scale, softcap, workspace, fuse=False)
        out, lse = torch.where(bad_row, true_out, out), torch.where(bad_row[..., 0], true_lse, lse)
    return (out.masked_fill(sees(poison, layout, q.shape[1], workspace), torch.nan) if bool(poison.any()) else out), lse


def eager_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: BlockLayout,
    scale: float, softcap: float | None, workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients dq `[B, H, M, D]`, dk `[B, G, N, D]`, dv `[B, G, N, E]` in the accumulation dtype."""
    empty = lse == -torch.inf
    delta = (grad_out.to(lse.dtype) * out).sum(-1).sub_(grad_lse).masked_fill_(empty, 0.0)
    if all(finite(tensor) for tensor in (q, k, v, grad_out, delta)):
        whole = out if can_fuse(q, v, softcap) and not bool(grad_lse.any()) else None
        lse = lse.masked_fill(empty, torch.inf)
        return _backward(grad_out, delta, whole, q, k, v, lse, layout, scale, softcap, workspace)

    def run(grad_out: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return _backward(grad_out, delta, None, q, k, v, lse, layout, scale, softcap, workspace)

    return careful_backward(run, grad_out, delta, q, k, v, lse, layout, workspace)


def careful_backward(
    run: Callable[..., tuple[Tensor, ...]], grad_out: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor,
    lse: Tensor, layout: BlockLayout, workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients where something is not finite: NaN where it is seen, and nowhere else.

    `run(grad_out, delta, q, k, v, lse)` gives those of finite inputs; its lse is +inf in rows that take no part.
    """
    empty = lse == -torch.inf
    usable = torch.isfinite(q).all(-1) & torch.isfinite(grad_out).all(-1) & torch.isfinite(delta) & ~lse.isnan()
    bad_key = ~(torch.isfinite(k).all(-1) & torch.isfinite(v).all(-1))[..., None]
    bad_row = (~usable | sees(bad_key, layout, q.shape[1], workspace)[..., 0]) & ~empty
    inert = bad_row | empty
    dq, dk, dv = run(
        grad_out.masked_fill(inert[..., None], 0), delta.masked_fill(inert, 0), q.masked_fill(inert[..., None], 0),
        k.masked_fill(bad_key, 0), v.masked_fill(bad_key, 0), lse.masked_fill(inert, torch.inf),
    )  # fmt: skip
    reached = sees(bad_row[..., None], layout.transpose(), q.shape[1], workspace)
    reached = reached.view(*k.shape[:2], -1, k.shape[2], 1).any(2)
    dq = dq.masked_fill(bad_row[..., None], torch.nan)
    return dq, dk.masked_fill(reached, torch.nan), dv.masked_fill(reached, torch.nan)


def finite(tensor: Tensor) -> bool:
    """Whether a sum over everything is finite: one pass; a rare overflow only costs the careful path."""
    return bool(torch.isfinite(tensor.sum(dtype=accumulation_dtype(tensor.dtype))))


def sees(flags: Tensor, layout: BlockLayout, heads: int, workspace: int) -> Tensor:
    """Bool `[B, heads, M, c]`: does a query see a key with the flag set; `flags` bool `[B, G, N, c]`."""
    query = torch.zeros(flags.shape[0], heads, layout.queries, 1, device=flags.device)
    key = torch.zeros(*flags.shape[:3], 1, device=flags.device)
    return _forward(query, key, flags.float(), layout, 1.0, None, workspace)[0] > 0


def to_blocks(tensor: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """`[B, H, N, D]` as `[B * H * blocks, size, D]`, the last block filled up; a view where possible."""
    if tensor.shape[2] % size:  # a pad by nothing would copy
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[2] % size), value=fill)
    return tensor.reshape(-1, size, tensor.shape[3])


def from_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_blocks`, for the batch, heads and tokens of `like`."""
    batch, heads, tokens, _ = like.shape
    blocks_each = -(-tokens // blocks.shape[1])
    return blocks.view(batch, heads, blocks_each * blocks.shape[1], blocks.shape[2])[:, :, :tokens]


def _take(blocks: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks `index` `[n, copies, c]` of `[*, size, D]`, joined: `[n * copies, c * size, D]`."""
    taken = blocks.index_select(0, index.flatten())
    return taken.view(index.shape[0] * index.shape[1], index.shape[2] * blocks.shape[1], blocks.shape[2]).to(dtype)


def _budget(device: torch.device, workspace: int) -> int:
    return min(workspace, CACHE) if device.type == "cpu" else workspace


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    softcap: float | None,
    workspace: int,
    *,
    fuse: bool = True,
) -> tuple[Tensor, Tensor]:
    """`eager_forward` for finite values, and finite keys unless `fuse` is off."""
    dtype, (block_q, block_k) = accumulation_dtype(q.dtype), layout.block
    queries, keys, values = to_blocks(q, block_q), to_blocks(k, block_k), to_blocks(v, block_k)
    out = torch.zeros(len(queries), block_q, v.shape[3], dtype=dtype, device=q.device)
    lse = torch.full((len(queries), block_q, 1), -torch.inf, dtype=dtype, device=q.device)
    sharing = Sharing(layout, q.shape[0], q.shape[1], k.shape[1])
    fused = fuse and can_fuse(q, v, softcap)
    height, width, size = sharing.stack * block_q, q.shape[3] + v.shape[3], dtype.itemsize
    tile_bytes = block_k * size * (2 * width + (0 if fused else height)) + 8 * block_q * block_k
    budget = _budget(q.device, workspace)
    masks = Masks(layout, budget)
    for piece in pieces(sharing, tile_bytes, 2 * height * width * size, budget):
        some_q = _take(queries, piece.query_blocks, dtype)
        some_k, some_v = _take(keys, piece.key_blocks, dtype), _take(values, piece.key_blocks, dtype)
        mask = masks.of(piece)
        if fused:
            part_out, part_lse = fused_forward(some_q, some_k, some_v, mask, scale)
        else:
            part_out, part_lse = tile_forward(some_q, some_k, some_v, mask, scale, softcap)
        _put(out, lse, part_out.view(-1, block_q, v.shape[3]), part_lse.reshape(-1, block_q, 1), piece)
    return from_blocks(out, q), from_blocks(lse, q).squeeze(-1)


def _put(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, piece: Piece) -> None:
    """Write a part of some rows, folded into what earlier parts left there."""
    where = piece.query_blocks.flatten()
    if piece.merged:
        old_lse = lse.index_select(0, where)
        new_lse = torch.logaddexp(old_lse, part_lse)
        shift = new_lse.masked_fill(new_lse == -torch.inf, 0.0)
        old_out = out.index_select(0, where).mul_((old_lse - shift).exp_())
        part_out, part_lse = old_out.addcmul_(part_out, (part_lse - shift).exp_()), new_lse
    out.index_copy_(0, where, part_out)
    lse.index_copy_(0, where, part_lse)


def _backward(
    grad_out: Tensor, delta: Tensor, out: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
    layout: BlockLayout, scale: float, softcap: float | None, workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`eager_backward` for finite inputs; `out` if the fused kernel is to run; lse +inf in rows that see nothing."""
    dtype, (block_q, block_k) = accumulation_dtype(q.dtype), layout.block
    queries, keys, values = to_blocks(q, block_q), to_blocks(k, block_k), to_blocks(v, block_k)
    grads, lses = to_blocks(grad_out, block_q), to_blocks(lse[..., None], block_q, torch.inf)
    sums = to_blocks(delta[..., None] if out is None else out, block_q)
    dq, dk, dv = (torch.zeros_like(blocks, dtype=dtype) for blocks in (queries, keys, values))
    sharing = Sharing(layout, q.shape[0], q.shape[1], k.shape[1])
    height, width, size = sharing.stack * block_q, q.shape[3] + v.shape[3], dtype.itemsize
    tile_bytes = block_k * size * (3 * width + (0 if out is not None else 3 * height)) + 8 * block_q * block_k
    budget = _budget(q.device, workspace)
    masks = Masks(layout, budget)
    for piece in pieces(sharing, tile_bytes, 4 * height * width * size, budget):
        some_q, some_grad, some_sum, some_lse = (
            _take(blocks, piece.query_blocks, dtype) for blocks in (queries, grads, sums, lses)
        )
        some_k, some_v = _take(keys, piece.key_blocks, dtype), _take(values, piece.key_blocks, dtype)
        row, mask = some_lse.squeeze(-1), masks.of(piece)
        if out is None:
            total = some_sum.squeeze(-1)
            part = tile_gradients(some_grad, total, some_q, some_k, some_v, mask, row, scale, softcap)
        else:
            part = fused_gradients(some_grad, some_sum, some_q, some_k, some_v, mask, row, scale)
        dq.index_add_(0, piece.query_blocks.flatten(), part[0].reshape(-1, block_q, q.shape[3]))
        _scatter(dk, piece.key_blocks.flatten(), part[1])
        _scatter(dv, piece.key_blocks.flatten(), part[2])
    return from_blocks(dq, q), from_blocks(dk, k), from_blocks(dv, v)


def _scatter(total: Tensor, index: Tensor, part: Tensor) -> None:
    """Add blocks that may repeat, in a fixed order: `index_add_` is deterministic on a CPU only."""
    part = part.reshape(len(index), *total.shape[1:])
    if total.device.type == "cpu":
        total.index_add_(0, index, part)
    else:
        total.index_put_((index,), part, accumulate=True)
