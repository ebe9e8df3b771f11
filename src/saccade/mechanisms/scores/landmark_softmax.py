"""Grouped softmax of Landmark Attention: the weight that a landmark earns is shared out among its block's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Score, require
from saccade.types import Kind, Pattern


@register(
    "landmark_softmax",
    Kind.SCORE,
    summary="Grouped softmax: a block's tokens share the weight that the landmark token at its end earns.",
    papers=("Landmark Attention: Random-Access Infinite Context Length for Transformers",),
    year=2023,
    code="epfml/landmark-attention",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"backward", "gqa", "segments", "streaming"}),
    training_free=False,
    exact_when="block > N",
    complexity="N^2",
    deviations=(
        (
            "Landmarks are every `block`-th token of a sequence, as the authors train; their code can take any set of "
            "them. Putting the landmark tokens into the text is the caller's."
        ),
        "The dropout of whole groups that the authors' code offers is left out.",
    ),
    example={"block": 8},
    exact=lambda n: {"block": n + 1},
)
@dataclass(frozen=True)
class LandmarkSoftmax(Score):
    """`weights[i, j] = S[i, j] S[i, p_j]`, of two softmaxes, with p_j the landmark that ends j's block.

    Within each earlier block S is the softmax over its tokens but the landmark. One more softmax goes over the tokens
    of the query's own block and the landmarks of the earlier ones, and there the second factor is 1. Landmarks
    themselves have weight 0; that of the own block is in no softmax. The policy `landmark` decodes with it.

    Args:
        block: Tokens of a block, the landmark at its end included; the authors take 51, and 64 in their kernels.
    """

    block: int = 51

    def __post_init__(self) -> None:
        require(self.block >= 2, "block", self.block, "at least 2, a token and its landmark")

    def normalise(self, scores: Tensor, mask: Tensor) -> Tensor:
        """See the class; a row's sequence is the run of keys that it may attend to, the last one itself."""
        size, keys = self.block, scores.shape[-1]
        place = torch.arange(keys, device=scores.device)
        start = torch.where(mask, place, keys).amin(-1, keepdim=True)
        own = torch.div(torch.where(mask, place, -1).amax(-1, keepdim=True) - start, size, rounding_mode="floor")
        blocks = -(-keys // size)
        taken = start + torch.arange(blocks * size, device=scores.device)  # keys of each row, its blocks aligned
        inside = taken < keys
        taken = taken.clamp(max=keys - 1)
        shown = (mask.gather(-1, taken.expand(*mask.shape[:-1], -1)) & inside).unflatten(-1, (blocks, size))
        taken = taken.expand(*scores.shape[:-1], -1)
        laid = scores.gather(-1, taken).unflatten(-1, (blocks, size))
        tokens = _masked(laid[..., :-1], shown[..., :-1])
        number = torch.arange(blocks, device=scores.device)
        landmarks = _masked(laid[..., -1], shown[..., -1] & (number < own))
        gates = torch.where(number == own, tokens.logsumexp(-1), landmarks).softmax(-1)
        weights = torch.nn.functional.pad(gates[..., None] * tokens.softmax(-1), (0, 1))
        weights = (weights * shown).flatten(-2)
        return torch.zeros_like(scores).scatter_add(-1, taken, weights * inside)


def _masked(scores: Tensor, shown: Tensor) -> Tensor:
    return scores.masked_fill(~shown, torch.finfo(scores.dtype).min)


__all__ = ["LandmarkSoftmax"]
