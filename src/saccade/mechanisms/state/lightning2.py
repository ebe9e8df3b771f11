"""Lightning Attention-2: linear attention whose heads forget at fixed rates, computed tile by tile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Mixer, require
from saccade.ops import ScanState, scan
from saccade.ops.checks import accumulation_dtype
from saccade.types import Kind, Pattern


def slopes(heads: int) -> list[float]:
    """ALiBi's slopes: 2^(-8 i / H), i = 1 .. H; between powers of two, every other slope of the next one fills up."""
    power = 2 ** math.floor(math.log2(heads))
    base = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    return base if power == heads else base + slopes(2 * power)[0::2][: heads - power]


@register(
    "lightning2",
    Kind.MIXER,
    summary="Causal linear attention with a fixed exponential decay per head, linear in N by tiles.",
    papers=(
        "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
        "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    ),
    year=2024,
    code="OpenNLPLab/lightning-attention",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "streaming"}),
    heads_differ=True,
    complexity="N",
    deviations=(
        "The mixing only: TransNormerLLM's SiLU on q, k and v, output norm and gate belong to the layer around it.",
        "The authors' tiles are one Triton kernel that keeps the state on chip; here they are batched products.",
    ),
    example={"layer": 1, "layers": 4, "tile": 16},
)
@dataclass(frozen=True)
class Lightning2(Mixer):
    """out_t = S_t^T q_t with S_t = e^(-s_h) S_{t-1} + k_t v_t^T: the token itself is not decayed, nothing is scaled.

    Head h of layer l has s_h = 2^(-8 (h + 1) / H) (1 - l / (layers - 1) + 1e-5): deeper layers remember longer.

    Args:
        layer: l, from 0.
        layers: Layers of the model; 1 leaves the slopes as they are.
        tile: Tokens per tile.
    """

    layer: int = 0
    layers: int = 1
    tile: int = 64

    def __post_init__(self) -> None:
        require(self.layers >= 1, "layers", self.layers, "at least 1")
        require(0 <= self.layer < self.layers, "layer", self.layer, f"a layer in [0, {self.layers})")
        require(self.tile >= 1, "tile", self.tile, "at least 1 token")

    def log_decay(self, q: Tensor) -> Tensor:
        """-s_h of every head `[H]`, in at least fp32."""
        depth = 1.0 if self.layers == 1 else 1.0 - self.layer / (self.layers - 1) + 1e-5
        rates = [-depth * slope for slope in slopes(q.shape[1])]
        return torch.tensor(rates, dtype=accumulation_dtype(q.dtype), device=q.device)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, state: ScanState | None) -> tuple[Tensor, ScanState]:  # noqa: ARG002
        """Decayed linear attention; the state is one D x E matrix per query head."""
        return scan(q, k, v, log_decay=self.log_decay(q), scale=1.0, initial_state=state, chunk=self.tile)
