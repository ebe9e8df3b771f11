"""Batches of tiles through the fused attention kernel that PyTorch has for CPUs: `ops.tile` without softcap, D = E."""

from __future__ import annotations

import torch
from torch import Tensor


def can_fuse(q: Tensor, v: Tensor, softcap: float | None) -> bool:
    """Whether the kernel serves; it knows one head dim and no softcap."""
    return softcap is None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1] > 0


def fused_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`tile_forward`."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    hidden = None if mask is None else _additive(mask, q)
    out, lse = (x.squeeze(1) for x in kernel(q[:, None], k[:, None], v[:, None], attn_mask=hidden, scale=scale))
    if mask is not None:
        # Where a whole row is hidden the kernel says lse 0, and a NaN query is still NaN.
        tiles, height, _ = mask.shape
        empty = ~mask.any(-1)[:, None]
        out.view(tiles, -1, height, v.shape[2]).masked_fill_(empty[..., None], 0.0)
        lse.view(tiles, -1, height).masked_fill_(empty, -torch.inf)
    return out, lse


def fused_gradients(
    grad_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`tile_backward` without a gradient of lse; lse is +inf, not -inf, in rows that see nothing."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
    hidden = None if mask is None else _additive(mask, q)
    tensors = (x[:, None] for x in (grad_out, q, k, v, out, lse))
    dq, dk, dv = kernel(*tensors, 0.0, is_causal=False, attn_mask=hidden, scale=scale)
    return dq.squeeze(1), dk.squeeze(1), dv.squeeze(1)


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    """0 where `mask` is True, else -inf, for every tile and stacked head: `[n, 1, m, L]`."""
    tiles, height, length = mask.shape
    hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    spread = hidden[:, None, None].expand(-1, len(q) // tiles, q.shape[1] // height, -1, -1)
    return spread.reshape(len(q), 1, q.shape[1], length)
