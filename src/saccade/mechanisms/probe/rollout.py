"""Attention rollout: how much of each input token flows into each token after many layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Probe, require
from saccade.mechanisms.probe.run import require_next
from saccade.types import Kind


@register(
    "rollout",
    Kind.PROBE,
    summary="Product over layers of the head-averaged attention map with the residual connection mixed in.",
    papers=("Quantifying Attention Flow in Transformers",),
    year=2020,
    code="samiraabnar/attention_flow",
    patterns=SELF_PATTERNS,
    supports=frozenset({"gqa", "segments"}),
    training_free=True,
    complexity="N^3",
    deviations=(
        "Attention flow, the paper's other measure (a maximum flow between tokens), is not part of this mechanism.",
        "A row that sees nothing passes its own token on unchanged; the paper has no such rows.",
    ),
)
@dataclass(eq=False)
class Rollout(Probe):
    """Rollout = A_L ... A_1, A_l = rows of (1 - residual) mean_heads(weights) + residual I, made to sum to 1.

    It needs whole maps: one N x N map for each layer is held, averaged over heads but for every sequence.

    Args:
        residual: Share of the residual connection; the paper's 0.5 by default.
    """

    residual: float = 0.5
    _chunks: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require(0 <= self.residual <= 1, "residual", self.residual, "a share in [0, 1]")

    def observe(self, weights: Tensor, mask: Tensor, first_query: int, layer: int) -> None:  # noqa: ARG002
        """Keep the head average of a chunk; chunks of a layer in order of queries, layers in any order."""
        chunks = self._chunks.setdefault(layer, [])
        require_next("rollout", first_query, sum(chunk.shape[1] for chunk in chunks), layer)
        chunks.append(weights.detach().mean(1))

    def result(self) -> Tensor:
        """The product of the layers' maps.

        Returns:
            `[B, N, N]`: row i says how much of each input token is in token i after the highest layer number.

        Raises:
            ValueError: If nothing was observed, or a layer's map is not square or not of the others' size.
        """
        require(bool(self._chunks), "layers", sorted(self._chunks), "at least one observed layer")
        rolled: Tensor | None = None
        for layer in sorted(self._chunks):
            attention = torch.cat(self._chunks[layer], 1)
            size = attention.shape[2] if rolled is None else rolled.shape[1]
            expected = (attention.shape[0] if rolled is None else rolled.shape[0], size, size)
            if tuple(attention.shape) != expected:
                raise ValueError(f"layer {layer}: map of shape {tuple(attention.shape)}, expected {expected}")
            identity = torch.eye(size, dtype=attention.dtype, device=attention.device)
            mixed = (1 - self.residual) * attention + self.residual * identity
            total = mixed.sum(-1, keepdim=True)
            mixed = torch.where(total > 0, mixed / total, identity)
            rolled = mixed if rolled is None else mixed @ rolled
        return rolled  # type: ignore[return-value]
