"""Attention entropy: how spread out each head's attention is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import ALL_PATTERNS, Probe, require
from saccade.types import Kind


@register(
    "entropy",
    Kind.PROBE,
    summary="Mean entropy of the attention rows of each head of each layer.",
    papers=(
        (
            "Attention Entropy is a Key Factor: An Analysis of Parallel Context Encoding with Full-attention-based "
            "Pre-trained Language Models"
        ),
    ),
    year=2024,
    patterns=ALL_PATTERNS,
    supports=frozenset({"gqa", "segments", "streaming"}),
    training_free=True,
    complexity="N^2",
    deviations=(
        "Queries that see nothing are left out of the mean.",
        "The paper's remedies for high entropy, shared sinks and selected context pieces, are not part of it.",
        "Written from the paper's description; no code of the authors was available to read.",
    ),
)
@dataclass(eq=False)
class Entropy(Probe):
    """Mean over sequences and queries of -sum_j p_j ln p_j, in nats.

    Chunks may come in any order and from any number of inputs.

    Args:
        relative: Divide each row's entropy by ln of the number of keys it may see, its largest possible value, so that
            rows of different lengths compare; rows that see a single key are then left out.
    """

    relative: bool = False
    _sums: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _counts: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def observe(self, weights: Tensor, mask: Tensor, first_query: int, layer: int) -> None:  # noqa: ARG002
        """Add a chunk's rows."""
        entropy = torch.special.entr(weights.detach()).double().sum(-1)
        seen = mask.expand(*mask.shape[:2], *weights.shape[2:]).sum(-1).expand_as(entropy)
        counted = seen > (1 if self.relative else 0)
        if self.relative:
            entropy = entropy / seen.clamp(min=2).double().log()
        sums, counts = (entropy * counted).sum((0, 2)), counted.sum((0, 2))
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums
        self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts

    def result(self) -> Tensor:
        """Mean entropy of each head.

        Returns:
            fp64 `[layers, H]`, layers ascending; 0 for a head without a counted row.

        Raises:
            ValueError: If nothing was observed.
        """
        require(bool(self._sums), "layers", sorted(self._sums), "at least one observed layer")
        return torch.stack([self._sums[layer] / self._counts[layer].clamp(min=1) for layer in sorted(self._sums)])
