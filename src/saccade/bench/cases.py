"""The cases of `saccade bench ops`: dense, windows and blocks here, the others in the two files beside."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saccade.bench import cases_maps, cases_memory, peers
from saccade.bench.case import DTYPES, HEADS, Case, Peer, Work, mode, on, ours_and, qkv
from saccade.ops import attend, block_attend
from saccade.types import BlockLayout

FEW_HEADS, BLOCK, WINDOW = 2, 64, 1024


def cases(*, quick: bool = False) -> list[Case]:
    """All, the short ones first within a group.

    Args:
        quick: Small sizes and no compiled peers.

    Returns:
        Cases that have not been prepared.
    """
    return [
        *dense_cases(quick), *window_cases(quick), *block_cases(quick), *cases_memory.cases(quick),
        *cases_maps.cases(quick),
    ]  # fmt: skip


def refused(reason: str, names: tuple[str, ...], build: Callable[[], Any], *, quick: bool) -> tuple[dict, dict]:
    """`({name: call}, {})` of a compiled peer, or `({}, {name: why not})`."""
    if quick:
        return {}, {names[0]: reason}
    try:
        return {names[0]: build()}, {}
    except ValueError as error:
        return {}, {names[0]: str(error)}


# -- dense ----------------------------------------------------------------------------------------------------------


def dense_cases(quick: bool) -> list[Case]:
    """Against SDPA; the longest runs with fewer heads, as many as keep them as short as the others."""
    sizes = [(256, 64)] if quick else list(itertools.product((1024, 4096, 16384), (64, 128)))
    found = []
    for (tokens, dim), dtype, causal, grad in itertools.product(sizes, DTYPES, (True, False), (False, True)):
        heads = HEADS if tokens <= 4096 or (causal and not grad) else FEW_HEADS
        kind, few = "causal" if causal else "full", "" if heads == HEADS else f" {heads} heads"
        name = f"dense {kind} N={tokens:,} D={dim}{few} {dtype} {mode(grad)}"
        found.append(Case(name, partial(_dense, tokens, dim, DTYPES[dtype], causal, grad, heads), grad))
    return found


def _dense(tokens: int, dim: int, dtype: torch.dtype, causal: bool, grad: bool, heads: int) -> Work:
    pairs = heads * (tokens * (tokens + 1) / 2 if causal else tokens**2)
    return ours_and(
        lambda q, k, v: attend(q, k, v, causal=causal, impl="cpu"),
        {"SDPA": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal)},
        qkv(tokens, dim, dtype, heads=heads, grad=grad),
        4 * pairs * dim,
    )


# -- windows --------------------------------------------------------------------------------------------------------


def window_cases(quick: bool) -> list[Case]:
    """A causal window of 1,024 tokens, as a band and as a layout, and building that layout."""
    tokens, window = (512, 64) if quick else (16384, WINDOW)
    found = [
        Case(f"window {window:,} N={tokens:,} D=64 {name} forward", partial(_window, tokens, window, dtype, quick))
        for name, dtype in DTYPES.items()
    ]
    long = 2**12 if quick else 2**20
    return [*found, Case(f"layout of a window {window:,} N={long:,}", partial(_window_layout, long, window))]


def _window(tokens: int, window: int, dtype: torch.dtype, quick: bool) -> Work:
    leaves = qkv(tokens, 64, dtype)
    layout = BlockLayout.window(tokens, tokens, window - 1, 0, block=BLOCK)
    others, skipped = refused(
        "not in a smoke run", ("FlexAttention",), lambda: peers.flex_window(tokens, window), quick=quick
    )
    others |= {
        "SDPA on slices": peers.window_slices(window, min(512, tokens // 4)),
        "our block_attend": lambda q, k, v: block_attend(q, k, v, layout, impl="cpu"),
    }
    pairs = HEADS * (window * (window + 1) / 2 + (tokens - window) * window)
    return ours_and(
        lambda q, k, v: attend(q, k, v, causal=True, window=(window - 1, 0), impl="cpu"),
        others, leaves, 4 * pairs * 64, skipped,
    )  # fmt: skip


def _window_layout(tokens: int, window: int) -> Work:
    def build() -> Tensor:
        return BlockLayout.window(tokens, tokens, window - 1, 0, block=BLOCK).indices

    return Work(build, {})


# -- blocks ---------------------------------------------------------------------------------------------------------


def block_cases(quick: bool) -> list[Case]:
    """A quarter of the blocks of 64 at random, for each head its own."""
    found = []
    for tokens, dtype in itertools.product((512,) if quick else (4096, 8192), DTYPES):
        for grad in (False, True) if tokens <= 4096 else (False,):
            name = f"blocks 25% of 64 N={tokens:,} D=64 {dtype} {mode(grad)}"
            found.append(Case(name, partial(_blocks, tokens, DTYPES[dtype], grad, quick), grad))
    long = 4096 if quick else 65536
    return [
        *found,
        Case(f"blocks 10% causal N={long:,} D=64 1 head {mode(grad=True)}", partial(_long, long), grad=True),
    ]


def random_blocks(tokens: int, share: float, heads: int = HEADS) -> Tensor:
    """`share` of the key blocks for each head and query block, ascending, int64 `[heads, Q, k]`."""
    blocks = tokens // BLOCK
    noise = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(5))
    return noise.topk(max(1, round(blocks * share)), -1).indices.sort(-1).values


def _blocks(tokens: int, dtype: torch.dtype, grad: bool, quick: bool) -> Work:
    leaves, chosen = qkv(tokens, 64, dtype, grad=grad), random_blocks(tokens, 0.25)
    layout = BlockLayout.from_indices(chosen[None], tokens, tokens, BLOCK)
    others: dict[str, Any] = dict(peers.gather_blocks(chosen, BLOCK))
    skipped = {"FlexAttention": "it has no backward on CPUs"}
    if not grad:
        compiled, skipped = refused(
            "not in a smoke run", ("FlexAttention",), lambda: peers.flex_blocks(chosen, BLOCK, tokens), quick=quick
        )
        others |= compiled
    pairs = HEADS * tokens * chosen.shape[2] * BLOCK
    work = ours_and(lambda q, k, v: block_attend(q, k, v, layout, impl="cpu"), others, leaves, 4 * pairs * 64, skipped)
    if not grad:
        share = pairs / (HEADS * tokens**2)
        dense = on(lambda q, k, v: attend(q, k, v, impl="cpu"), leaves)
        work.peers["density x our dense"] = Peer(dense, share, same=False)
    return work


def random_layout(tokens: int, density: float, heads: int = 1, seed: int = 0) -> BlockLayout:
    """Causal blocks: the diagonal, and others at random so that `density` of the causal pairs is kept."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // BLOCK)
    past = torch.ones(blocks, blocks, dtype=torch.bool).tril(-1)
    chosen = (torch.rand(heads, blocks, blocks, generator=generator) < density) & past
    chosen |= torch.eye(blocks, dtype=torch.bool)
    layout = BlockLayout.from_block_mask(chosen[None], BLOCK, BLOCK, tokens, tokens)
    return layout & BlockLayout.window(tokens, tokens, -1, 0, block=BLOCK)


def _long(tokens: int) -> Work:
    """Nothing of size N x N, forward or backward: what matters here is the memory."""
    layout = random_layout(tokens, 0.10)
    flops = 4 * 64 * float(layout.pairs().sum())
    return ours_and(
        lambda q, k, v: block_attend(q, k, v, layout), {}, qkv(tokens, 64, torch.float32, heads=1, grad=True), flops
    )
