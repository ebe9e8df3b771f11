"""The engines against PyTorch's own attention, on the same work, in interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saccade.bench.measure import interleaved, median, peak_bytes
from saccade.ops import attend, block_attend, scan
from saccade.types import BlockLayout

HEADS, DIM, BLOCK = 8, 64, 64


@dataclass(frozen=True)
class Case:
    """One measurement: seconds of ours and of what it is held against, and the peak memory of one of our calls."""

    name: str
    ours: float
    against: str
    theirs: float | None
    peak_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the ratio."""
        return asdict(self) | {"ratio": None if self.theirs is None else self.theirs / self.ours}

    def cells(self) -> tuple[str, ...]:
        """For a table."""
        theirs = "" if self.theirs is None else f"{1e3 * self.theirs:.1f} ms"
        ratio = "" if self.theirs is None else f"{self.theirs / self.ours:.2f}x"
        memory = "" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:.0f} MiB"
        return self.name, f"{1e3 * self.ours:.1f} ms", self.against, theirs, ratio, memory


def bench_ops(*, quick: bool = False, rounds: int = 5) -> list[Case]:
    """Every case; `quick` divides the lengths by four."""
    part = 4 if quick else 1
    return [
        _window_layout(2**20 // part),
        _random_blocks(8192 // part, rounds),
        _window(16384 // part, rounds),
        _dense(4096 // part, rounds),
        _large_backward(65536 // part),
        _scan(16384 // part, rounds),
    ]


def _qkv(tokens: int, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, tokens, DIM, generator=generator) for _ in range(3))  # type: ignore[return-value]


def random_layout(tokens: int, density: float, heads: int = 1, seed: int = 0) -> BlockLayout:
    """Causal blocks: the diagonal, and others at random so that `density` of the causal pairs is kept."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // BLOCK)
    past = torch.ones(blocks, blocks, dtype=torch.bool).tril(-1)
    chosen = (torch.rand(heads, blocks, blocks, generator=generator) < density) & past
    chosen |= torch.eye(blocks, dtype=torch.bool)
    layout = BlockLayout.from_block_mask(chosen[None], BLOCK, BLOCK, tokens, tokens)
    return layout & BlockLayout.window(tokens, tokens, -1, 0, block=BLOCK)


def _against(name: str, ours: Callable[[], Any], against: str, theirs: Callable[[], Any], rounds: int) -> Case:
    times = interleaved({"ours": ours, "theirs": theirs}, rounds)
    return Case(name, median(times["ours"]), against, median(times["theirs"]), peak_bytes(ours))


def _window_layout(tokens: int) -> Case:
    """Building the layout of a window of 1,024 tokens."""

    def build() -> BlockLayout:
        return BlockLayout.window(tokens, tokens, 1023, 0, block=BLOCK)

    times = interleaved({"build": build}, rounds=3)
    return Case(f"layout of a 1,024-token window, N={tokens:,}", median(times["build"]), "", None, peak_bytes(build))


def _random_blocks(tokens: int, rounds: int) -> Case:
    q, k, v = _qkv(tokens)
    layout = random_layout(tokens, 0.25)
    mask = layout.to_dense()[0, 0]
    return _against(
        f"block_attend, 25% of causal blocks, N={tokens:,}",
        lambda: block_attend(q, k, v, layout),
        "SDPA, dense bool mask",
        lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask),
        rounds,
    )


def _window(tokens: int, rounds: int) -> Case:
    q, k, v = _qkv(tokens)
    layout = BlockLayout.window(tokens, tokens, 1023, 0, block=BLOCK)
    return _against(
        f"block_attend, window 1,024, N={tokens:,}",
        lambda: block_attend(q, k, v, layout),
        "SDPA, causal",
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        rounds,
    )


def _dense(tokens: int, rounds: int) -> Case:
    q, k, v = _qkv(tokens)
    return _against(
        f"attend, causal, N={tokens:,}",
        lambda: attend(q, k, v, causal=True),
        "SDPA, causal",
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        rounds,
    )


def _large_backward(tokens: int) -> Case:
    """Forward and backward with 10% of the causal blocks, one head."""
    q, k, v = (x.requires_grad_() for x in _qkv(tokens, heads=1))
    layout = random_layout(tokens, 0.10)

    def run() -> None:
        block_attend(q, k, v, layout).sum().backward()

    memory = peak_bytes(run)
    seconds = interleaved({"run": run}, rounds=1, warmup=0)["run"][0]
    return Case(f"block_attend forward + backward, 10%, 1 head, N={tokens:,}", seconds, "", None, memory)


def _scan(tokens: int, rounds: int) -> Case:
    q, k, v = _qkv(tokens)
    decay = -torch.rand(1, HEADS, tokens, generator=torch.Generator().manual_seed(1))
    return _against(
        f"scan, scalar decay, N={tokens:,}",
        lambda: scan(q, k, v, log_decay=decay),
        "SDPA, causal",
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        rounds,
    )
