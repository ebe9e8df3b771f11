"""`block_attend` in portable PyTorch: batches of query blocks over gathered key blocks, within a bounded workspace."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.block_attend.pieces import Masks, Piece, Sharing, pieces
from saccade.ops.checks import accumulation_dtype
from saccade.ops.tile import tile_forward, tile_gradients
from saccade.types import BlockLayout

CACHE = 4 * 2**20
"""Bytes a CPU works on at a time: what stays in its cache runs faster than what fills the workspace."""


def eager_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, softcap: float | None, workspace: int
) -> tuple[Tensor, Tensor]:
    """Out `[B, H, M, E]` and lse `[B, H, M]`, both in the accumulation dtype; layout and inputs are checked already."""
    if finite(k) and finite(v):
        return _forward(q, k, v, layout, scale, softcap, workspace)
    bad = torch.stack([~torch.isfinite(k).all(-1), ~torch.isfinite(v).all(-1)], -1)
    hidden = bad.any(-1, keepdim=True)
    out, lse = _forward(q, k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), layout, scale, softcap, workspace)
    seen = sees(bad, layout, q.shape[1], workspace)
    return out.masked_fill_(seen.any(-1, keepdim=True), torch.nan), lse.masked_fill_(seen[..., 0], torch.nan)


def eager_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
    softcap: float | None,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq `[B, H, M, D]`, dk `[B, G, N, D]`, dv `[B, G, N, E]` in the accumulation dtype."""
    empty = lse == -torch.inf
    delta = (grad_out.to(lse.dtype) * out).sum(-1).sub_(grad_lse).masked_fill_(empty, 0.0)
    if all(finite(tensor) for tensor in (q, k, v, grad_out, delta)):
        return _backward(grad_out, delta, q, k, v, lse, layout, scale, softcap, workspace)
    bad_row = ~(torch.isfinite(q).all(-1) & torch.isfinite(grad_out).all(-1) & torch.isfinite(delta)) & ~empty
    bad_row |= ~torch.isfinite(lse) & ~empty
    bad_key = ~(torch.isfinite(k).all(-1) & torch.isfinite(v).all(-1))[..., None]
    inert = (bad_row | empty)[..., None]
    dq, dk, dv = _backward(
        grad_out.masked_fill(inert, 0), delta.masked_fill(inert[..., 0], 0), q.masked_fill(inert, 0),
        k.masked_fill(bad_key, 0), v.masked_fill(bad_key, 0), lse.masked_fill(inert[..., 0], -torch.inf),
        layout, scale, softcap, workspace,
    )  # fmt: skip
    reached = sees(bad_row[..., None], layout.transpose(), q.shape[1], workspace)
    reached = reached.view(*k.shape[:2], -1, k.shape[2], 1).any(2)
    return dq.masked_fill_(bad_row[..., None], torch.nan), *(grad.masked_fill_(reached, torch.nan) for grad in (dk, dv))


def finite(tensor: Tensor) -> bool:
    """Whether a sum over everything is finite: one pass; a rare overflow only costs the careful path."""
    return bool(torch.isfinite(tensor.sum(dtype=accumulation_dtype(tensor.dtype))))


def sees(flags: Tensor, layout: BlockLayout, heads: int, workspace: int) -> Tensor:
    """Bool `[B, heads, M, c]`: does a query see a key with the flag set; `flags` bool `[B, G, N, c]`."""
    batch = flags.shape[0]
    query = torch.zeros(batch, heads, layout.queries, 1, device=flags.device)
    key = torch.zeros(*flags.shape[:3], 1, device=flags.device)
    return _forward(query, key, flags.float(), layout, 1.0, None, workspace)[0] > 0


def to_blocks(tensor: Tensor, size: int) -> Tensor:
    """`[B, H, N, D]` as `[B * H * blocks, size, D]`, the last block filled up with zeros; a view where possible."""
    tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[2] % size))
    return tensor.reshape(-1, size, tensor.shape[3])


def from_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_blocks`, for the batch, heads and tokens of `like`."""
    batch, heads, tokens, _ = like.shape
    return blocks.view(batch, heads, -1, blocks.shape[2])[:, :, :tokens]


def _budget(device: torch.device, workspace: int) -> int:
    return min(workspace, CACHE) if device.type == "cpu" else workspace


def _take(blocks: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks `index` `[n, copies, c]` of `[*, size, D]`, joined: `[n * copies, c * size, D]`."""
    taken = blocks.index_select(0, index.flatten())
    return taken.view(index.shape[0] * index.shape[1], -1, blocks.shape[2]).to(dtype)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, softcap: float | None, workspace: int
) -> tuple[Tensor, Tensor]:
    """`eager_forward` for finite keys and values."""
    dtype = accumulation_dtype(q.dtype)
    block_q, block_k = layout.block
    queries, keys, values = to_blocks(q, block_q), to_blocks(k, block_k), to_blocks(v, block_k)
    out = torch.zeros(len(queries), block_q, v.shape[3], dtype=dtype, device=q.device)
    lse = torch.full((len(queries), block_q, 1), -torch.inf, dtype=dtype, device=q.device)
    sharing = Sharing(layout, q.shape[0], q.shape[1], k.shape[1])
    height, width, size = sharing.stack * block_q, q.shape[3] + v.shape[3], dtype.itemsize
    fused = softcap is None and q.device.type == "cpu" and q.shape[3] == v.shape[3] > 0
    tile_bytes = block_k * (2 * width * size + (0 if fused else height * size)) + 4 * block_q * block_k
    budget = _budget(q.device, workspace)
    masks = Masks(layout, budget)
    for piece in pieces(sharing, tile_bytes, 2 * height * width * size, budget):
        tensors = (_take(queries, piece.query_blocks, dtype),) + tuple(
            _take(blocks, piece.key_blocks, dtype) for blocks in (keys, values)
        )
        mask = masks.of(piece)
        part = fused_forward(*tensors, mask, scale) if fused else tile_forward(*tensors, mask, scale, softcap)
        _put(out, lse, part[0].view(-1, block_q, v.shape[3]), part[1].view(-1, block_q, 1), piece)
    return from_blocks(out, q), from_blocks(lse, q).squeeze(-1)


def fused_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`tile_forward` by the fused kernel that PyTorch has for CPUs; D = E."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    tiles, rows, _ = q.shape
    if mask is None:
        out, lse = kernel(q[:, None], k[:, None], v[:, None], scale=scale)
        return out, lse
    stack = rows // mask.shape[1]
    hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    hidden = hidden.repeat_interleave(tiles // len(mask), 0) if len(mask) < tiles else hidden
    out, lse = kernel(
        q.view(tiles, stack, -1, q.shape[2]), k[:, None].expand(-1, stack, -1, -1), v[:, None].expand(-1, stack, -1, -1),
        attn_mask=hidden[:, None], scale=scale,
    )  # fmt: skip
    # Where a whole row is hidden the kernel says lse 0, and a NaN query is still NaN.
    empty = ~mask.any(-1)[:, None]
    lse = lse.reshape(len(mask), -1, rows // stack).masked_fill(empty, -torch.inf)
    return out.reshape(len(mask), -1, rows // stack, v.shape[2]).masked_fill(empty[..., None], 0.0), lse


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
    grad_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
    softcap: float | None,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`eager_backward` for finite inputs."""
    dtype = accumulation_dtype(q.dtype)
    block_q, block_k = layout.block
    queries, keys, values = to_blocks(q, block_q), to_blocks(k, block_k), to_blocks(v, block_k)
    grads, deltas = to_blocks(grad_out, block_q), to_blocks(delta[..., None], block_q)
    lses = to_blocks(lse.masked_fill(lse == -torch.inf, torch.inf)[..., None], block_q)
    dq, dk, dv = (torch.zeros_like(blocks, dtype=dtype) for blocks in (queries, keys, values))
    sharing = Sharing(layout, q.shape[0], q.shape[1], k.shape[1])
    height, width, size = sharing.stack * block_q, q.shape[3] + v.shape[3], dtype.itemsize
    tile_bytes = block_k * (3 * height * size + 4 * width * size) + 4 * block_q * block_k
    budget = _budget(q.device, workspace)
    masks = Masks(layout, budget)
    for piece in pieces(sharing, tile_bytes, 4 * height * width * size, budget):
        to_q, to_k = piece.query_blocks.flatten(), piece.key_blocks.flatten()
        part = tile_gradients(
            _take(grads, piece.query_blocks, dtype), _take(deltas, piece.query_blocks, dtype).squeeze(-1),
            _take(queries, piece.query_blocks, dtype), _take(keys, piece.key_blocks, dtype),
            _take(values, piece.key_blocks, dtype), masks.of(piece),
            _take(lses, piece.query_blocks, dtype).squeeze(-1), scale, softcap,
        )  # fmt: skip
        dq.index_add_(0, to_q, part[0].view(-1, block_q, q.shape[3]))
        _scatter(dk, to_k, part[1])
        _scatter(dv, to_k, part[2])
    return from_blocks(dq, q), from_blocks(dk, k), from_blocks(dv, v)


def _scatter(total: Tensor, index: Tensor, part: Tensor) -> None:
    """Add blocks that may repeat, in a fixed order: `index_add_` is deterministic on a CPU only."""
    part = part.view(len(index), *total.shape[1:])
    if total.device.type == "cpu":
        total.index_add_(0, index, part)
    else:
        total.index_put_((index,), part, accumulate=True)
