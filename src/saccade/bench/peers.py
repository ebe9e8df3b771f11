"""What a careful user writes in PyTorch where it has no engine for the pattern: what the engines are held against."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@cache
def no_compiler() -> str | None:
    """Why `torch.compile` cannot be used as a peer here, or None: tried once on a small function."""
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        return "torch.compile has no C++ compiler here"
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8))
    except Exception as error:  # noqa: BLE001 - whatever inductor raises
        return f"torch.compile fails here: {type(error).__name__}"
    return None


def flex(block_mask: Any) -> Attention:
    """Compiled FlexAttention with a block mask.

    Args:
        block_mask: FlexAttention's `BlockMask`.

    Returns:
        A function of q, k, v; the first call compiles.

    Raises:
        ValueError: If `torch.compile` does not work here.
    """
    reason = no_compiler()
    if reason is not None:
        raise ValueError(reason)
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # noqa: SLF001 - at the default of 8 it falls back without a word
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def flex_window(tokens: int, window: int) -> Attention:
    """A causal sliding window in compiled FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    reason = no_compiler()
    if reason is not None:
        raise ValueError(reason)

    def near(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001
        return (i >= j) & (i - j < window)

    return flex(create_block_mask(near, None, None, tokens, tokens, device="cpu"))


def flex_blocks(chosen: Tensor, block: int, tokens: int) -> Attention:
    """Chosen full blocks `[H, Q, k]` in compiled FlexAttention."""
    from torch.nn.attention.flex_attention import BlockMask

    heads, rows, kept = chosen.shape
    indices = torch.zeros(1, heads, rows, rows, dtype=torch.int32)
    indices[..., :kept] = chosen
    counts = torch.full((1, heads, rows), kept, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(indices), counts, indices, BLOCK_SIZE=block,
        seq_lengths=(tokens, tokens),
    )  # fmt: skip
    return flex(mask)


def gather_blocks(chosen: Tensor, block: int) -> dict[str, Attention]:
    """Chosen full blocks `[H, Q, k]`: keys and values gathered by `index_select`, then matmuls, or SDPA."""
    heads, rows, _ = chosen.shape
    flat = (chosen.long() + torch.arange(heads)[:, None, None] * rows).reshape(-1)

    def gather(x: Tensor) -> Tensor:
        return x.reshape(heads * rows, block, -1).index_select(0, flat).view(heads, rows, -1, x.shape[-1])

    def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q.reshape(heads, rows, block, -1) * q.shape[-1] ** -0.5) @ gather(k).mT
        return (scores.softmax(-1) @ gather(v)).view(q.shape)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q.reshape(heads, rows, block, -1), gather(k), gather(v)).reshape(q.shape)

    return {"gather + matmul": matmul, "gather + SDPA": sdpa}


def window_slices(window: int, piece: int = 512) -> Attention:
    """A causal sliding window: SDPA on slices of `piece` queries and the keys they can see, masks made once."""
    masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for start in range(0, q.shape[2], piece):
            end, low = min(start + piece, q.shape[2]), max(0, start - window + 1)
            key = (end - start, end - low, q.dtype)
            if key not in masks:
                distance = torch.arange(start, end)[:, None] - torch.arange(low, end)
                hidden = (distance < 0) | (distance >= window)
                masks[key] = torch.zeros(distance.shape, dtype=q.dtype).masked_fill(hidden, -torch.inf)
            out.append(
                scaled_dot_product_attention(
                    q[:, :, start:end], k[:, :, low:end], v[:, :, low:end], attn_mask=masks[key]
                )
            )
        return torch.cat(out, 2)

    return run


def neighbourhood(side: int, kernel: int) -> dict[str, Attention]:
    """Each token of a `side` x `side` map sees `kernel` x `kernel` around it, moved inside at the borders."""
    starts = (torch.arange(side) - kernel // 2).clamp(0, side - kernel)
    columns = torch.arange(side)
    seen = (columns >= starts[:, None]) & (columns < starts[:, None] + kernel)
    rows = starts.tolist()

    def unfold(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, dim = q.shape

        def windows(x: Tensor) -> Tensor:
            cut = x.view(batch, heads, side, side, dim).unfold(2, kernel, 1).unfold(3, kernel, 1)
            return cut[:, :, starts][:, :, :, starts].reshape(batch, heads, tokens, dim, kernel * kernel)

        weights = ((q * dim**-0.5)[..., None, :] @ windows(k)).softmax(-1)
        return (weights @ windows(v).mT).view(q.shape)

    def bands(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, _, dim = q.shape
        mask = torch.zeros(side, kernel * side, dtype=q.dtype).masked_fill(~seen.repeat(1, kernel), -torch.inf)
        q, k, v = (x.view(batch, heads, side, side, dim) for x in (q, k, v))

        def band(x: Tensor, start: int) -> Tensor:
            return x[:, :, start : start + kernel].reshape(batch, heads, kernel * side, dim)

        lines = [
            scaled_dot_product_attention(q[:, :, y], band(k, start), band(v, start), attn_mask=mask)
            for y, start in enumerate(rows)
        ]
        return torch.stack(lines, 2).reshape(batch, heads, side * side, dim)

    return {"unfold + matmul": unfold, "SDPA per map row": bands}


def chunked_scan(log_decay: Tensor, chunk: int) -> Attention:
    """Linear attention with a decay per head, `[H]`: all chunks in one batched matmul, states in a loop."""
    place = torch.arange(chunk, dtype=torch.float32)
    distance = place[:, None] - place
    inside = torch.where(distance >= 0, torch.exp(log_decay[:, None, None] * distance.clamp(min=0)), 0.0)[None, :, None]
    from_start = torch.exp(log_decay[:, None] * (place + 1))[None, :, None, :, None]
    to_end = torch.exp(log_decay[:, None] * (chunk - 1 - place))[None, :, None, :, None]
    whole = torch.exp(log_decay * chunk)[None, :, None, None]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q = q * shape[-1] ** -0.5
        q, k, v = (x.view(*shape[:2], -1, chunk, x.shape[-1]) for x in (q, k, v))
        near = ((q @ k.mT) * inside.to(q.dtype)) @ v
        added = (k * to_end.to(k.dtype)).mT @ v
        state, states = torch.zeros_like(added[:, :, 0]), []
        for update in added.unbind(2):
            states.append(state)
            state = state * whole.to(state.dtype) + update
        return (near + (q * from_start.to(q.dtype)) @ torch.stack(states, 2)).view(shape)

    return run
