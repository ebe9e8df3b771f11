"""What a forward pass needs beyond its inputs and its result grows with the tokens, not with their pairs."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saccade.bench.measure import can_measure_peak, peak_bytes
from saccade.kernels import cpu
from saccade.ops import attend, block_attend, decode_attend, gather_attend, scan
from saccade.types import BlockLayout, Boxes, KVPages, TokenIndex

pytestmark = [
    pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}"),
    pytest.mark.skipif(not can_measure_peak(), reason="this system does not let a process reset its peak memory"),
    pytest.mark.skipif("SACCADE_SANITIZED" in os.environ, reason="the sanitizer keeps what is freed"),
]

HEADS, DIM, KEPT = 2, 64, 32
FIXED = 2**22
"""Bytes for the threads' scratch and what else does not grow."""

PER_ROW = 4 * (DIM + 1) + 32
"""Bytes for each token of each head: its log-sum-exp, its result in fp32 until it is rounded, and a little more."""


def qkv(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, tokens, DIM, generator=generator).to(dtype) for _ in range(3)]


def dense(tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    q, k, v = qkv(tokens, dtype)
    return lambda: attend(q, k, v, causal=True, impl="cpu")


def blocks(tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    q, k, v = qkv(tokens, dtype)
    layout = BlockLayout.window(tokens, tokens, 255, 0, block=64)
    return lambda: block_attend(q, k, v, layout, impl="cpu")


def lists(tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    q, k, v = qkv(tokens, dtype)
    near = (torch.arange(tokens)[:, None] + torch.arange(KEPT)) % tokens
    index = TokenIndex(near.expand(1, HEADS, -1, -1).contiguous(), tokens, tokens)
    return lambda: gather_attend(q, k, v, index, impl="cpu")


def boxes(tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    q, k, v = qkv(tokens, dtype)
    place = torch.arange(tokens, dtype=torch.int32)
    index = Boxes((place - 16).clamp(min=0), (place + 16).clamp(max=tokens - 1), (tokens,), (1,))
    return lambda: gather_attend(q, k, v, index, impl="cpu")


def decay(tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    q, k, v = qkv(tokens, dtype)
    log_decay = torch.full((1, HEADS, tokens), -0.01)
    return lambda: scan(q, k, v, log_decay=log_decay, impl="cpu")[0]


def decode(tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    q, k, v = qkv(tokens, dtype)
    table = torch.arange(HEADS * tokens // 64).view(1, HEADS, -1)
    pages = KVPages(k.view(-1, 64, DIM), v.view(-1, 64, DIM), table, torch.full((1, HEADS), tokens))
    return lambda: decode_attend(q[:, :, :1], pages, impl="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forward", [dense, blocks, lists, boxes, decay, decode])
def test_extra_memory_of_a_forward_is_linear(forward: Callable[..., Callable[[], Tensor]], dtype: torch.dtype):
    tokens = 8192
    call = forward(tokens, dtype)
    result = call().nbytes
    peak = max(peak_bytes(call) or 0 for _ in range(3))  # one may find what it needs among what was freed
    assert peak - result < FIXED + PER_ROW * HEADS * tokens
