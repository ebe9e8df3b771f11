"""Cases of other shapes: a neighbourhood on a 2-D map, a linear scan, and choosing blocks."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.bench import peers
from saccade.bench.case import DTYPES, HEADS, Case, Peer, Work, draw, mode, on, ours_and, qkv
from saccade.catalog import get
from saccade.ops import attend, scan
from saccade.types import BlockLayout, Geometry

KERNEL = 7

CHOOSING: dict[str, dict[str, Any]] = {
    "moba": {"chunk": 64, "topk": 16, "query_block": 64}, "moba per query": {}, "sparge": {}, "xattention": {},
}  # fmt: skip
"""Selectors, by the first word, and what differs from their papers' settings."""


def cases(quick: bool) -> list[Case]:
    """Neighbourhoods, scans, index building."""
    found = []
    side, batches = (14, (1,)) if quick else (56, (1, 8))
    for batch, dtype, grad in itertools.product(batches, DTYPES, (False, True)):
        name = f"neighbourhood {side}x{side} of {KERNEL}x{KERNEL} B={batch} 4 heads D=32 {dtype} {mode(grad)}"
        found.append(Case(name, partial(_neighbourhood, side, batch, DTYPES[dtype], grad), grad))
    for tokens, dtype in itertools.product((512,) if quick else (4096, 16384, 131072), DTYPES):
        name = f"scan scalar decay N={tokens:,} D=64 {dtype} forward"
        found.append(Case(name, partial(_scan, tokens, DTYPES[dtype], held=False)))
        if dtype == "fp32":
            found.append(Case(f"{name}, memory held", partial(_scan, tokens, DTYPES[dtype], held=True)))
    tokens = 1024 if quick else 16384
    for label, settings in CHOOSING.items():
        name = f"choosing {label} N={tokens:,} D=64 fp32"
        found.append(Case(name, partial(_choosing, tokens, label.split(" ")[0], settings)))
    return found


def _neighbourhood(side: int, batch: int, dtype: torch.dtype, grad: bool) -> Work:
    leaves = [draw(batch, 4, side * side, 32, dtype=dtype, seed=seed, grad=grad) for seed in range(3)]
    mechanism = get("neighborhood").build(kernel_size=KERNEL)
    by_hand = peers.neighbourhood(side, KERNEL)
    if batch > 1:
        del by_hand["unfold + matmul"]  # gigabytes, and the slower of the two
    geometry = Geometry(grid=(side, side))
    return ours_and(
        lambda q, k, v: mechanism(q, k, v, geometry=geometry),
        by_hand, leaves, 4.0 * batch * 4 * side**2 * KERNEL**2 * 32,
    )  # fmt: skip


def _scan(tokens: int, dtype: torch.dtype, *, held: bool) -> Work:
    """Against PyTorch; all on memory that the process holds, or on what the system gives: fresh pages, where long."""
    q, k, v = qkv(tokens, 64, dtype)
    decay = torch.log(1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float32)))
    spread = decay[None, :, None].expand(1, HEADS, tokens)

    def ours() -> Tensor:
        return scan(q, k, v, log_decay=spread, impl="cpu")[0]

    ours()
    others = {
        f"PyTorch, chunks of {chunk}": Peer(on(peers.chunked_scan(decay, chunk), [q, k, v])) for chunk in (64, 128, 256)
    }
    return Work(ours, others, 4.0 * HEADS * tokens * 64 * 64, keeps_memory=held)


def _choosing(tokens: int, selector: str, settings: dict[str, Any]) -> Work:
    """From queries and keys to a finished layout, against a twentieth of dense attention."""
    q, k, v = qkv(tokens, 64, torch.float32)
    mechanism, geometry = get(selector).target(**settings), Geometry(causal=True)

    def choose() -> Tensor:
        layout = mechanism.select(q, k, geometry)
        if not isinstance(layout, BlockLayout):
            raise ValueError(f"selector={selector!r}: expected one that chooses blocks")
        return layout.indices

    dense = Peer(lambda: attend(q, k, v, causal=True), 0.05, same=False)
    return Work(choose, {"5% of our dense": dense})
