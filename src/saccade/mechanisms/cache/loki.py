"""Loki: keys are ranked in the few directions that they vary in, and the best are read whole."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._derived import (
    Derived,
    StepSelection,
    highest,
    key_nbytes,
    of_each_token,
    per_query_head,
    recall,
    rows_form,
    scores,
)
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.forms import Forms, floats
from saccade.mechanisms.cache.store import KVStore
from saccade.ops.checks import accumulation_dtype
from saccade.types import Kind, Pattern, TokenIndex


@register(
    "loki",
    Kind.CACHE_POLICY,
    summary="Decoding ranks all keys in a few principal components and reads the best tokens.",
    papers=("Loki: Low-Rank Keys for Efficient Sparse Attention",),
    year=2024,
    code="hpcgroup/loki",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"chunks", "gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"selecting"}),
    deviations=(
        (
            "The authors keep all keys rotated in the cache and read the leading channels of those; here these are a "
            "copy beside the store, dims / (D + E) more bytes held. With eviction it is made anew when slots move."
        ),
        (
            "Without `components` they are fitted to the keys that are stored when the first token is decoded, one "
            "set per sequence and head, and then kept; the authors calibrate on text, once per model."
        ),
        (
            "The components are directions in which keys are long, unless `centred`; the authors', scikit-learn's, are "
            "those in which they differ from their mean. A first token that most of the attention rests on has a key "
            "near zero: all that tells it from the others is the mean, which centred components leave out."
        ),
        "The budget is a number of tokens, not a share of the length; a call with several tokens is dense.",
    ),
    example={"tokens": 12, "dims": 4},
    exact=lambda n: {"tokens": n, "dims": 2},
    ladder=lambda n: tuple({"tokens": max(n // part, 1), "dims": 4} for part in (32, 16, 8, 4, 2)),
    at_budget=lambda b: {"tokens": b.count, "dims": 16},
)
@dataclass(frozen=True)
class Loki(StepSelection):
    """A query head reads the `tokens` keys with the largest `(q P) (k P)^T`; their scores are then exact.

    P `[D, dims]` are the leading eigenvectors of `sum_j k_j k_j^T`, or with `centred` of the keys' covariance, which
    the paper has. Nothing is evicted. A step costs the `dims` leading coordinates of all keys, and its tokens.

    Args:
        tokens: Tokens read per query head.
        dims: Leading components used for ranking; the paper takes a quarter or an eighth of D.
        components: One `[G, D, >= dims]` per layer, columns by falling variance (`principal_components`); None fits
            them to the prompt.
        dense_layers: First layers that read everything.
        centred: Whether the mean of the keys is taken off before components are fitted, as the authors do.
    """

    tokens: int = 1024
    dims: int = 32
    components: tuple[Tensor, ...] | None = field(default=None, repr=False, compare=False)
    dense_layers: int = 0
    centred: bool = False

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1 token")
        require(self.dims >= 1, "dims", self.dims, "at least 1 component")
        require(self.dense_layers >= 0, "dense_layers", self.dense_layers, "at least 0 layers")

    def derives(self) -> Forms:
        """Components of the prompt's keys, unless they are given, and each token's coordinates."""
        fitted = {"loki components": {"basis": floats("B G D D")}} if self.components is None else {}
        return {"loki": rows_form(self.dims), **fitted}

    def select(self, q: Tensor, store: KVStore, step: Step) -> TokenIndex:
        """The best slots of each query head, `[B, H, 1, min(tokens, n)]`."""
        basis = self._basis(q, store, step)
        reduced = of_each_token(store, "loki", lambda keys: (keys.to(basis.dtype) @ basis).to(keys.dtype), step)
        step.choosing += reduced.nbytes
        ranks = scores(q @ per_query_head(basis, q).to(q.dtype), reduced, store.lengths)
        return highest(ranks, self.tokens, len(store))

    def _basis(self, q: Tensor, store: KVStore, step: Step) -> Tensor:
        """`[B or 1, G, D, dims]` in fp32 (fp64 for fp64)."""
        dim, heads = q.shape[3], store.lengths.shape[1]
        require(self.dims <= dim, "dims", self.dims, f"at most the {dim} channels of a key")
        if self.components is not None:
            fits = step.layer < len(self.components)
            require(fits, "components", len(self.components), f"one for each layer, also layer {step.layer}")
            given = self.components[step.layer]
            expected = f"[{heads}, {dim}, {self.dims} or more]"
            fits = given.ndim == 3 and given.shape[:2] == (heads, dim) and given.shape[2] >= self.dims
            require(fits, "components", tuple(given.shape), expected)
            return given[None, :, :, : self.dims].to(q.device, accumulation_dtype(q.dtype))
        kept = recall(store, "loki components")
        if kept is None:
            step.choosing += int(store.lengths.sum()) * key_nbytes(store)
            fitted = principal_components(store.keys, store.present, centred=self.centred)
            kept = store.derived["loki components"] = Derived(store.changes, {"basis": fitted})
        return kept.tensors["basis"][..., : self.dims]


def principal_components(keys: Tensor, present: Tensor | None = None, *, centred: bool = True) -> Tensor:
    """Eigenvectors of the covariance of keys, by falling eigenvalue, as columns.

    Args:
        keys: `[.., n, D]`.
        present: Bool `[.., n]`, which count; None for all.
        centred: Whether the mean is taken off first; else of the sum of `k k^T`, whose leading directions hold most
            of the keys' squared lengths.

    Returns:
        `[.., D, D]` in fp32 (fp64 for fp64).
    """
    keys = keys.to(accumulation_dtype(keys.dtype))
    count = present[..., None] if present is not None else torch.ones_like(keys[..., :1], dtype=torch.bool)
    keys = keys * count
    if centred:
        keys = (keys - keys.sum(-2, keepdim=True) / count.sum(-2, keepdim=True).clamp(min=1)) * count
    return torch.linalg.eigh(keys.transpose(-1, -2) @ keys).eigenvectors.flip(-1)


__all__ = ["Loki", "principal_components"]
