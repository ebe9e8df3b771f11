"""Sink rate: the fraction of heads that put much of their attention on one token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import ALL_PATTERNS, Probe, require
from saccade.mechanisms.probe.run import require_next
from saccade.types import Kind


@register(
    "sink_rate",
    Kind.PROBE,
    summary="Fraction of heads, over layers and sequences, whose mean attention to a token exceeds epsilon.",
    papers=("When Attention Sink Emerges in Language Models: An Empirical View",),
    year=2024,
    code="sail-sg/Attention-Sink",
    patterns=ALL_PATTERNS,
    supports=frozenset({"gqa", "segments", "streaming"}),
    training_free=True,
    complexity="N^2",
    deviations=(
        "The mean is over the queries that may see the token, N - k + 1 of them in the paper's causal attention.",
        "The paper's attention operations without sinks (sigmoid without normalisation) are not part of this probe.",
    ),
)
@dataclass(eq=False)
class SinkRate(Probe):
    """Mean over sequences, layers and heads of [importance of `token` > epsilon], importance a column's mean weight.

    Args:
        token: Key whose rate `result` gives; 0 is the first token.
        epsilon: Threshold on the importance; the paper uses 0.3.
    """

    token: int = 0
    epsilon: float = 0.3
    _sums: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _counts: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _rows: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.token >= 0, "token", self.token, "at least 0")
        require(0 <= self.epsilon <= 1, "epsilon", self.epsilon, "a weight in [0, 1]")

    def observe(self, weights: Tensor, mask: Tensor, first_query: int, layer: int) -> None:
        """Add a chunk's columns; chunks of a layer in order of queries, layers in any order."""
        require_next("sink_rate", first_query, self._rows.get(layer, 0), layer)
        require(self.token < weights.shape[3], "token", self.token, f"a key below {weights.shape[3]}")
        self._rows[layer] = first_query + weights.shape[2]
        sums = weights.detach().double().sum(2)
        counts = mask.expand(*mask.shape[:2], *weights.shape[2:]).sum(2)
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums
        self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts

    def importance(self) -> Tensor:
        """Mean weight of each key over the queries that may see it.

        Returns:
            fp64 `[layers, B, H, N]`, layers ascending.

        Raises:
            ValueError: If nothing was observed.
        """
        require(bool(self._sums), "layers", sorted(self._sums), "at least one observed layer")
        layers = sorted(self._sums)
        return torch.stack([self._sums[layer] / self._counts[layer].clamp(min=1) for layer in layers])

    def rates(self) -> Tensor:
        """fp64 `[N]`: the sink rate of every key."""
        return (self.importance() > self.epsilon).double().mean((0, 1, 2))

    def result(self) -> float:
        """The sink rate of `token`, in [0, 1]."""
        return float(self.rates()[self.token])
