"""DART: drop the tokens that duplicate a few pivots, keep those least like them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from saccade.catalog import register
from saccade.mechanisms.base import Reduced, Reducer, require
from saccade.ops.checks import accumulation_dtype
from saccade.types import Kind


@register(
    "dart",
    Kind.REDUCER,
    summary="Keeps pivots, the tokens with the largest keys, and the tokens least similar to them.",
    papers=("Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",),
    year=2025,
    code="ZichenWen1/DART",
    supports=frozenset({"backward"}),
    training_free=True,
    exact_when="budget = 1",
    complexity="N log N",
    deviations=(
        "All pivots are among the tokens to reduce; the authors' code adds as many from the text of the prompt.",
        (
            "Exactly round(budget * N) tokens are kept: where the pivots do not divide them evenly the first pivots "
            "keep one more, while the authors' code rounds down."
        ),
        "As in the authors' code `keys` choose the pivots, by L1 norm, and similarity is measured on `tokens`.",
        "The map back is ours: a dropped token is stood for by the pivot most similar to it.",
    ),
    example={"budget": 0.25, "pivots": 4},
    exact=lambda n: {"budget": 1.0},  # noqa: ARG005
    ladder=lambda n: tuple({"budget": budget} for budget in (1 / 9, 2 / 9, 1 / 3, 0.5, 0.75)),  # noqa: ARG005
)
@dataclass(frozen=True)
class DART(Reducer):
    """Pivots P = the tokens with the largest |key|_1. Each in turn keeps, of what is left, the least similar to it.

    Similarity is the cosine of the tokens; pivots go from the largest key down.

    Args:
        budget: Fraction of tokens kept, pivots included; at least one token stays.
        pivots: Number of pivots, at most the tokens kept.
    """

    budget: float = 1 / 9
    pivots: int = 8

    def __post_init__(self) -> None:
        require(0 < self.budget <= 1, "budget", self.budget, "a fraction kept, in (0, 1]")
        require(self.pivots >= 1, "pivots", self.pivots, "at least 1 token")

    def reduce(self, tokens: Tensor, keys: Tensor | None = None) -> Reduced:
        """Fewer tokens of `[B, N, C]`.

        Args:
            tokens: `[B, N, C]`, hidden states.
            keys: `[B, N, C']`, their attention keys with heads side by side; None means `tokens`.

        Returns:
            The kept tokens in their old order, with the map back.

        Raises:
            ValueError: If shapes do not fit or there are no tokens.
        """
        require(tokens.ndim == 3 and tokens.shape[1] > 0, "tokens.shape", tuple(tokens.shape), "[B, N, C], N >= 1")
        keys = tokens if keys is None else keys
        fits = keys.ndim == 3 and keys.shape[:2] == tokens.shape[:2]
        require(fits, "keys.shape", tuple(keys.shape), f"[{tokens.shape[0]}, {tokens.shape[1]}, C']")
        batch, count, channels = tokens.shape
        pivots, similarity, chosen = self._choose(tokens.detach(), keys.detach())
        places = torch.arange(count, device=tokens.device).expand(batch, count)
        kept = places[chosen].view(batch, -1)
        nearest = pivots.gather(1, similarity.argmax(-1))
        owner = torch.where(chosen, places, nearest)
        assignment = (chosen.cumsum(1) - 1).gather(1, owner)
        return Reduced(tokens.gather(1, kept[..., None].expand(-1, -1, channels)), kept, assignment)

    def _choose(self, tokens: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pivots `[B, P]`, cosine similarity to them `[B, N, P]`, and which tokens stay, bool `[B, N]`."""
        dtype = accumulation_dtype(tokens.dtype)
        budget = max(1, round(self.budget * tokens.shape[1]))
        count = min(self.pivots, budget)
        norms = keys.to(dtype).abs().sum(-1)
        pivots = norms.sort(dim=1, descending=True, stable=True).indices[:, :count]
        unit = functional.normalize(tokens.to(dtype), dim=-1)
        similarity = unit @ unit.gather(1, pivots[..., None].expand(-1, -1, unit.shape[2])).transpose(1, 2)
        chosen = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter_(1, pivots, value=True)
        each, extra = divmod(budget - count, count)
        for pivot in range(count):
            left = similarity[..., pivot].masked_fill(chosen, torch.inf)
            least = left.sort(dim=1, stable=True).indices[:, : each + (pivot < extra)]
            chosen = chosen.scatter(1, least, value=True)
        return pivots, similarity, chosen
