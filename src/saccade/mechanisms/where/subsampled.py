"""Stochastically subsampled self-attention: in training each query meets a random part of the keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Selector, require
from saccade.types import Geometry, Kind, TokenIndex


@register(
    "subsampled",
    Kind.SELECTOR,
    summary="Shuffled keys, anew in each step: windows of queries meet windows of them, or all the first ones.",
    papers=("The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",),
    year=2023,
    code="shamim-hussain/ssa",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "gqa", "lse"}),
    exact_when="size >= N",
    complexity="N",
    deviations=(
        (
            "After figure 3 of the paper and the page in the authors' repository, which holds no code. How the locally "
            "biased shuffle is drawn is in neither: here places plus Gaussian noise of `sigma` tokens are sorted."
        ),
        "One shuffle for all heads and sequences of a call, as drawn in that figure; give each layer and step its own.",
        (
            "Causal use cuts the same pattern, and a query whose window holds no earlier key gets 0; the text at hand "
            "does not say what the authors do."
        ),
        "For training, followed by a short fine-tuning with full attention; `self_ensemble` is its use in inference.",
    ),
    example={"size": 16, "sigma": 4.0},
    exact=lambda n: {"size": max(n, 1)},
)
@dataclass(frozen=True)
class Subsampled(Selector):
    """With keys in a random order o: form "unbiased": all queries see the keys o_0 .. o_{size - 1}.

    Form "local": queries of window r, r size .. (r + 1) size - 1, see the keys o_j with j in the same window, o being
    the order of j + sigma * noise_j.

    Args:
        form: Which.
        size: Keys that a query sees.
        sigma: How far, in tokens, keys are moved about in the local form.
        seed: Of the order.
    """

    form: Literal["local", "unbiased"] = "local"
    size: int = 128
    sigma: float = 64.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.form in ("local", "unbiased"), "form", self.form, "'local' or 'unbiased'")
        require(self.size >= 1, "size", self.size, "at least 1 token")
        require(0 <= self.sigma < float("inf"), "sigma", self.sigma, "a number of at least 0")
        require(0 <= self.seed < 2**31, "seed", self.seed, "a number in [0, 2^31)")

    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> TokenIndex:
        """One list of keys for all queries, or one for each window of them."""
        queries, keys = q.shape[2], k.shape[2]
        lists = self._lists(self._order(keys)).to(q.device)
        if self.form == "unbiased":
            return TokenIndex(lists[None, None, :queries], queries, keys, max(queries, 1), geometry.causal)
        if queries == keys:
            return TokenIndex(lists[None, None], queries, keys, self.size, geometry.causal)
        window = torch.arange(keys - queries, keys, device=q.device) // self.size  # of the last ones, over a cache
        return TokenIndex(lists[window][None, None], queries, keys, 1, geometry.causal)

    def _order(self, keys: int) -> Tensor:
        """Keys in random order."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.form == "unbiased":
            return torch.randperm(keys, generator=generator)
        return (torch.arange(keys) + self.sigma * torch.randn(keys, generator=generator, dtype=torch.float64)).argsort()

    def _lists(self, order: Tensor) -> Tensor:
        """Keys of each window, ascending, or of all: int64 `[windows or 1, size]`, -1 behind a short one."""
        if self.form == "unbiased":
            return order[None, : self.size].sort(-1).values
        lists = torch.nn.functional.pad(order, (0, -len(order) % self.size), value=len(order)).view(-1, self.size)
        lists = lists.sort(-1).values
        return lists.masked_fill(lists == len(order), -1)


def self_ensemble(predict: Callable[[Subsampled], Tensor], mechanism: Subsampled, members: int) -> Tensor:
    """The mean prediction of several sub-models, each with its own shuffle.

    Args:
        predict: Prediction of the model with the mechanism it is given in its layers.
        mechanism: The first member's; the others' seeds count on.
        members: How many.

    Returns:
        The mean of what `predict` returns.

    Raises:
        ValueError: If there are no members.
    """
    require(members >= 1, "members", members, "at least 1")
    return torch.stack([predict(replace(mechanism, seed=mechanism.seed + i)) for i in range(members)]).mean(0)
