"""What a case of `saccade bench ops` is, and the inputs and calls that cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HEADS = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Peer:
    """What ours is held against.

    Args:
        call: One run.
        share: Its time counts times this, such as the density for dense attention.
        same: Whether it returns what ours returns; then the results are compared.
    """

    call: Callable[[], Any]
    share: float = 1.0
    same: bool = True


@dataclass(frozen=True)
class Work:
    """The inputs and calls of one case; they live while it runs.

    Args:
        ours: One run of ours; returns a tensor, or a tuple of them.
        peers: What it is held against, by name.
        flops: Useful floating-point operations of one run (backward: twice the forward; no credit for recomputing).
        bytes: Bytes that one run must read, where memory is the limit.
        skipped: Peers that cannot run here, and why.
        before: Called, untimed, before every run.
        keeps_memory: Whether all are timed on memory that the process holds already (`keeping_memory`).
    """

    ours: Callable[[], Any]
    peers: dict[str, Peer]
    flops: float | None = None
    bytes: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    before: Callable[[], Any] = lambda: None
    keeps_memory: bool = False


@dataclass(frozen=True)
class Case:
    """A named measurement, prepared when its turn comes.

    Args:
        name: Group and sizes; what `only` is matched with.
        prepare: Makes the inputs; raises ValueError where the engine cannot run the case.
        grad: Whether gradients are taken.
    """

    name: str
    prepare: Callable[[], Work]
    grad: bool = False


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False) -> Tensor:
    """Normal numbers, the same for the same shape and seed."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_(grad)


def qkv(tokens: int, dim: int, dtype: torch.dtype, *, heads: int = HEADS, grad: bool = False) -> list[Tensor]:
    """q, k and v `[1, heads, tokens, dim]`."""
    return [draw(1, heads, tokens, dim, dtype=dtype, seed=seed, grad=grad) for seed in range(3)]


def on(call: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
    """`call` on the inputs; with its gradients where they are asked for."""
    if not leaves[0].requires_grad:
        return lambda: call(*leaves)
    weight = draw(*leaves[0].shape[:3], leaves[2].shape[3], dtype=leaves[0].dtype, seed=9)

    def run() -> tuple[Tensor, ...]:
        out = call(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, weight)

    return run


def ours_and(
    ours: Callable[..., Tensor], others: dict[str, Callable[..., Tensor]], leaves: list[Tensor], flops: float,
    skipped: dict[str, str] | None = None,
) -> Work:  # fmt: skip
    """Work of calls that take q, k and v and compute the same."""
    runs = {name: Peer(on(call, leaves)) for name, call in others.items()}
    times = 3 if leaves[0].requires_grad else 1
    return Work(on(ours, leaves), runs, flops * times, skipped=skipped or {})


def mode(grad: bool) -> str:
    """How names call it."""
    return "forward+backward" if grad else "forward"
