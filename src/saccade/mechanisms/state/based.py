"""BASED's linear attention: the softmax kernel's second-order Taylor expansion, with a state of fixed size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Mixer, require
from saccade.ops import ScanState, scan
from saccade.ops.checks import accumulation_dtype
from saccade.types import Kind, Pattern


def taylor_features(x: Tensor) -> Tensor:
    """Features with phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(D): `[..., 1 + D + D (D + 1) / 2]`.

    Products x_a x_b are symmetric, so each pair a < b is kept once with twice its share: the kernel is the same, the
    state half the size.
    """
    dim = x.shape[-1]
    row, column = torch.triu_indices(dim, dim, device=x.device)
    weight = torch.full_like(row, dim**-0.5, dtype=x.dtype).masked_fill(row == column, (2 * dim) ** -0.5)
    return torch.cat([torch.ones_like(x[..., :1]), x * dim**-0.25, x[..., row] * x[..., column] * weight], -1)


@register(
    "based",
    Kind.MIXER,
    summary="Normalised linear attention with the features of exp's second-order Taylor polynomial.",
    papers=("Simple linear attention language models balance the recall-throughput tradeoff",),
    year=2024,
    code="HazyResearch/based",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "streaming"}),
    complexity="N",
    deviations=(
        "The linear layers only; the paper's models alternate them with windows (`sink_window`, sinks=0).",
        "The projections to a small feature dim (16 in the paper) are the model's: q and k arrive with D features.",
        "Repeated products are kept once, so the state has 1 + D + D (D + 1) / 2 rows instead of 1 + D + D^2.",
        "No epsilon in the denominator: each term is at least 1/2.",
    ),
    example={"chunk": 16},
)
@dataclass(frozen=True)
class Based(Mixer):
    """out_t = sum_j w_tj v_j / sum_j w_tj with w_tj = 1 + s + s^2 / 2 and s = q_t . k_j / sqrt(D), in O(N D^2 E).

    Args:
        chunk: Tokens per chunk of the causal scan.
    """

    chunk: int = 64

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "chunk", self.chunk, "at least 1 token")

    def mix(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, state: ScanState | None) -> tuple[Tensor, ScanState]:  # noqa: ARG002
        """Linear attention on Taylor features, which are computed in at least fp32."""
        dtype = accumulation_dtype(q.dtype)
        queries, keys, values = taylor_features(q.to(dtype)), taylor_features(k.to(dtype)), v.to(dtype)
        out, state = scan(queries, keys, values, normalise=True, initial_state=state, chunk=self.chunk)
        return out.to(q.dtype), state
