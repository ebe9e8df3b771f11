"""ACT: tone down attention sinks in the middle of the text and give their attention to the other tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import PLAIN, SELF_PATTERNS, Intervention, require, require_pattern
from saccade.mechanisms.probe.run import weight_chunks
from saccade.ops import attend
from saccade.ops.checks import check_qkv, check_segments
from saccade.types import Geometry, Kind


@register(
    "act",
    Kind.INTERVENTION,
    summary="Attention sinks beyond the first token are scaled by beta; what they lose goes to the other tokens.",
    papers=(
        (
            "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
            "Attention Calibration"
        ),
    ),
    year=2024,
    code="GATECH-EIC/ACT",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa"}),
    training_free=True,
    exact_when="beta = 1",
    complexity="N^2",
    deviations=(
        (
            "Sinks are found from the whole attention map, as in the paper, so which keys are calibrated for a query "
            "depends on later queries too: the output is not causal, and differs in prefill and step by step."
        ),
        "The authors' code leaves out the first sink it finds, whichever it is; this one leaves out the first token.",
        "A row whose visible keys are all sinks stays as it is; the paper has no such rows.",
        "The offline search for the heads worth calibrating is the caller's; the default calibrates every head.",
    ),
    example={"alpha": 2.0, "beta": 0.4},
    exact=lambda n: {"beta": 1.0},  # noqa: ARG005
)
@dataclass(frozen=True)
class ACT(Intervention):
    """Sinks are the keys other than the first whose mean weight, over the queries that see them, exceeds alpha / N.

    In every row a sink's weight w becomes beta w; what this frees is shared among the other keys, the first included,
    in proportion to their weights, so that rows still sum to 1. A call finds the sinks in a first pass over the
    whole map, in bounded chunks of queries, at twice the work of the scores.

    Args:
        alpha: Threshold in units of the uniform weight 1 / N.
        beta: What a sink keeps, in [0, 1].
        heads: Query heads to calibrate; None means all.
    """

    alpha: float = 5.0
    beta: float = 0.4
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require(self.alpha > 0, "alpha", self.alpha, "more than 0")
        require(0 <= self.beta <= 1, "beta", self.beta, "a fraction in [0, 1]")
        require(self.heads is None or min(self.heads, default=0) >= 0, "heads", self.heads, "numbers of at least 0")

    def edit(self, weights: Tensor, mask: Tensor) -> Tensor:
        """Calibrated weights `[B, H, m, N]`, the sinks found from these m rows alone: pass the whole map."""
        totals, counts = _columns(weights, mask)
        return self._calibrate(weights, self._sinks(totals, counts))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, scale: float | None = None,
        impl: str = "auto",
    ) -> Tensor:  # fmt: skip
        """Softmax attention with calibrated weights: `[B, H, M, E]`; arguments as for `Intervention`."""
        check_qkv(q, k, v)
        check_segments(q, k, geometry.q_segments, geometry.kv_segments)
        require_pattern(self.card, q, k, geometry)
        sinks = self.find(q, k, geometry, scale=scale)

        def normalise(scores: Tensor, mask: Tensor) -> Tensor:
            hidden = ~mask
            softmax = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
            # a chunk has the keys 0 .. n - 1 that its queries may see
            return self._calibrate(softmax.masked_fill(hidden, 0.0), sinks[..., : scores.shape[3]])

        return attend(q, k, v, causal=geometry.causal, scale=scale, normalise=normalise, impl=impl)

    @torch.no_grad()
    def find(self, q: Tensor, k: Tensor, geometry: Geometry = PLAIN, *, scale: float | None = None) -> Tensor:
        """Bool `[B, H, N]`: the sinks, from the whole attention map of q `[B, H, M, D]` and k `[B, G, N, D]`."""
        totals = torch.zeros(*q.shape[:2], k.shape[2], dtype=torch.float64, device=q.device)
        counts = torch.zeros(1, 1, k.shape[2], dtype=torch.int64, device=q.device)
        for _, weights, mask in weight_chunks(q, k, geometry, scale=scale):
            chunk_totals, chunk_counts = _columns(weights, mask)
            totals, counts = totals + chunk_totals, counts + chunk_counts
        return self._sinks(totals, counts)

    def _sinks(self, totals: Tensor, counts: Tensor) -> Tensor:
        """Bool `[B, H, N]` from each key's total weight `[B, H, N]` and the number of queries that see it."""
        heads, keys = totals.shape[1:]
        sinks = totals / counts.clamp(min=1) > self.alpha / max(keys, 1)
        sinks[..., :1] = False
        if self.heads is not None:
            require(max(self.heads, default=0) < heads, "heads", self.heads, f"numbers below {heads}, the query heads")
            chosen = torch.zeros(heads, 1, dtype=torch.bool, device=totals.device)
            chosen[list(self.heads)] = True
            sinks = sinks & chosen
        return sinks

    def _calibrate(self, weights: Tensor, sinks: Tensor) -> Tensor:
        """Weights `[B, H, m, N]` with the sinks `[B, H, N]` toned down."""
        at_sinks = sinks[:, :, None]
        others = weights.masked_fill(at_sinks, 0.0)
        kept = others.sum(-1, keepdim=True)
        freed = (1 - self.beta) * weights.masked_fill(~at_sinks, 0.0).sum(-1, keepdim=True)
        shared = others / torch.where(kept > 0, kept, 1.0) * freed
        return torch.where(kept > 0, torch.where(at_sinks, self.beta * weights, others + shared), weights)


def _columns(weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Total weight of every key, fp64 `[B, H, N]`, and how many queries see it, `[B or 1, H or 1, N]`."""
    counts = mask.expand(*mask.shape[:2], *weights.shape[2:]).sum(2)
    return weights.detach().double().sum(2), counts
