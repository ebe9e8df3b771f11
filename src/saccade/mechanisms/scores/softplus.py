"""Softplus attention: length-scaled softplus with l1 normalisation (LSSA), and a re-weighting that sharpens (LSSAR)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from saccade.catalog import register
from saccade.mechanisms.base import ALL_PATTERNS, PLAIN, Score, require
from saccade.ops.checks import accumulation_dtype, check_qkv, check_segments
from saccade.types import Geometry, Kind

UNSHIFTED_KEYS = 3
"""Rows that see at most this many keys keep the threshold 0: the first three rows of the paper's matrix O."""


@register(
    "softplus",
    Kind.SCORE,
    summary="Softplus of cosine scores times log D log N, l1-normalised and sharpened by a power.",
    papers=("Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",),
    year=2025,
    code="iminfine/freeatten",
    patterns=ALL_PATTERNS,
    supports=frozenset({"backward", "gqa", "segments", "streaming"}),
    training_free=False,
    complexity="N^2",
    deviations=(
        (
            "N of a row is the number of keys it may see, which for causal attention is the paper's row number; the "
            "threshold is 0 where N <= 3 instead of in the first three rows, so that packed and stepwise calls agree."
        ),
        "The power is taken of weights divided by the row's largest, which changes nothing but cannot overflow.",
        "A row in which no weight exceeds 1/N by more than rounding gives 0, the limit of the paper's 0 / (0 + eps).",
        (
            "Written from descriptions of the paper's equations at second hand: neither its full text nor the authors' "
            "repository was available to read, so details that those leave out may differ."
        ),
    ),
    example={"power": 3.0},
)
@dataclass(frozen=True)
class Softplus(Score):
    """A = l1(softplus(log D log N cos(q, k))); with a power p, weights = l1(relu(N A - O)^p), O = 1 (0 if N <= 3).

    Queries and keys are l2-normalised first. `scale` of the call replaces log D, the default.

    Args:
        power: p of the re-weighting; the paper uses 3 at the training length and 15 to extrapolate. None leaves it out
            (LSSA).
    """

    power: float | None = 15.0

    def __post_init__(self) -> None:
        require(self.power is None or self.power >= 1, "power", self.power, "at least 1, or None")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, scale: float | None = None,
        impl: str = "auto",
    ) -> Tensor:  # fmt: skip
        """As in `Score`, on l2-normalised queries and keys; `scale=None` means log D."""
        check_qkv(q, k, v)
        check_segments(q, k, geometry.q_segments, geometry.kv_segments)
        if geometry.kv_segments is not None:
            # the norm of a poisoned padding key would turn its zero gradient into NaN
            k = k.masked_fill((geometry.kv_segments < 0)[:, None, :, None], 0.0)
        scale = math.log(q.shape[3]) if scale is None else scale
        return super().__call__(_unit(q), _unit(k), v, geometry=geometry, scale=scale, impl=impl)

    def normalise(self, scores: Tensor, mask: Tensor) -> Tensor:
        """See the class; `scores` are log D cos(q, k). Masked pairs and rows that see nothing get exactly 0."""
        hidden = ~mask
        seen = mask.expand(*mask.shape[:-1], scores.shape[-1]).sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
        weights = _l1(functional.softplus(scores * seen.log()).masked_fill(hidden, 0.0))
        if self.power is None:
            return weights
        threshold = (seen > UNSHIFTED_KEYS).to(scores.dtype)
        excess = torch.relu(seen * weights - threshold).masked_fill(hidden, 0.0)
        largest = excess.detach().amax(-1, keepdim=True) if excess.shape[-1] else excess.sum(-1, keepdim=True)
        flat = largest <= 32 * torch.finfo(scores.dtype).eps
        sharpened = (excess / largest.masked_fill(flat, 1.0)).pow(self.power)
        return _l1(sharpened.masked_fill(flat, 0.0))


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1 in the dtype of `x`; a row of zeros stays."""
    return functional.normalize(x.to(accumulation_dtype(x.dtype)), dim=-1).to(x.dtype)


def _l1(x: Tensor) -> Tensor:
    """Non-negative rows that sum to 1; a row of zeros stays."""
    total = x.sum(-1, keepdim=True)
    return x / torch.where(total > 0, total, 1.0)
