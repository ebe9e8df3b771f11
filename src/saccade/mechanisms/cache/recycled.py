"""Recycled Attention: now and then a token attends fully, the tokens after it read what it attended to most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._derived import Derived, between, key_nbytes, listed, recall
from saccade.mechanisms.cache.base import CachePolicy, Step
from saccade.mechanisms.cache.reading import score_stored
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern, TokenIndex

LIST = "recycled"


@register(
    "recycled",
    Kind.CACHE_POLICY,
    summary="Decoding reads the tokens that the last full step attended to most; a full step comes by stride or need.",
    papers=("Recycled Attention: Efficient inference for long-context language models",),
    year=2024,
    code="carriex/recycled-attention",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"chunks", "gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"selecting"}),
    heads_share=True,
    deviations=(
        (
            "Written from the paper's description; the authors' code was not at hand. Where that leaves a choice open: "
            "query heads that share a key count with the greatest of their weights, the similarity of two tokens is "
            "the mean cosine over heads, and the token that leaves the list for a new one is that with the least "
            "weight in the last full step; tokens that came since have none and stay."
        ),
        (
            "The authors copy the recycled tokens to a second, small cache; here a list says where they lie, and the "
            "engine reads them in place."
        ),
        "A full step scores its keys once to attend and once to rank, as the authors do beside FlashAttention.",
        (
            "A list is lost where slots move (eviction, forks, beams): the next step is full. A call with several "
            "tokens is dense, and its last token makes the list."
        ),
    ),
    example={"tokens": 8, "stride": 3},
    exact=lambda n: {"tokens": n},
    ladder=lambda n: tuple({"tokens": max(n // part, 1), "stride": 5} for part in (32, 16, 8, 4, 2)),
    at_budget=lambda b: {"tokens": b.count, "stride": 10, "similarity": 0.8},
)
@dataclass(frozen=True)
class Recycled(CachePolicy):
    """Between full steps, a key/value head reads `tokens` tokens: the best of the last full step, and all since.

    A full step ranks tokens by its softmax weights, the greatest among the query heads that share a key. Each token
    that is decoded then joins the list, and the one with the least weight leaves it. Nothing is evicted. Every
    `stride`-th step is full; with `similarity` it is only if the mean cosine between its queries and those of the last
    full step is below. Layers and sequences decide for themselves.

    Args:
        tokens: Tokens that a recycled step reads per key/value head, K in the paper.
        stride: Steps from one full step, or look at the queries, to the next, S in the paper; 1 with no `similarity`
            is dense.
        similarity: Least cosine at which a list is used on, s in the paper (0.8 there); None for a fixed stride.
    """

    tokens: int = 4096
    stride: int = 50
    similarity: float | None = None

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1 token")
        require(self.stride >= 1, "stride", self.stride, "at least 1 step")
        fits = self.similarity is None or -1 <= self.similarity <= 1
        require(fits, "similarity", self.similarity, "a cosine from -1 to 1, or None")

    def read(self, q: Tensor, store: KVStore, step: Step) -> TokenIndex | None:  # noqa: ARG002
        """All in full steps and for several tokens, else the list and what came since, `[B, G, 1, K]`."""
        kept = recall(store, LIST)
        if q.shape[2] != 1 or kept is None:
            return None
        lengths, order = store.lengths, kept.tensors["order"]
        since = lengths - kept.tensors["lengths"]
        full = (since[:, 0] % self.stride == 0) & self._unlike(q, kept.tensors["query"])
        kept.tensors["full"] = full
        if bool(full.all()):
            return None
        place = torch.arange(order.shape[2], device=q.device)
        old = order.masked_fill(full[:, None, None] | (place >= (self.tokens - since)[..., None]), -1)
        first = torch.where(full[:, None], 0, lengths - since.clamp(max=self.tokens))
        return listed(torch.cat([old, between(first, lengths)], -1), len(store))

    def settle(self, q: Tensor, store: KVStore, step: Step) -> None:
        """After a full step, of all sequences or some: the new list."""
        found = store.derived.pop(LIST, None)
        every = found is None or q.shape[2] > 1
        full = store.seen >= 0 if every else found.tensors["full"]
        if not bool(full.all()):
            if found.changes == store.changes:  # else its slots are elsewhere: the next step is full
                store.derived[LIST] = self._renewed(found, q, store, step, full)
            return
        tensors = {"order": self.ranked(q, store, step), "query": q[:, :, -1].clone()}
        store.derived[LIST] = Derived(store.changes, {**tensors, "lengths": store.lengths, "full": full})

    def ranked(self, q: Tensor, store: KVStore, step: Step) -> Tensor:
        """Slots by the weight that the last query gives them, the greatest first, `[B, G, min(tokens, n)]`; -1 past."""
        step.choosing += int(store.lengths.sum()) * key_nbytes(store)
        weights = score_stored(q[:, :, -1:], store, scale=step.scale).softmax(-1)
        received = weights[:, :, 0].unflatten(1, (store.lengths.shape[1], -1)).amax(2)
        received = received.masked_fill(~store.present, -torch.inf)
        highest, order = received.topk(min(self.tokens, len(store)), dim=-1)
        return order.masked_fill(highest == -torch.inf, -1)

    def _renewed(self, found: Derived, q: Tensor, store: KVStore, step: Step, full: Tensor) -> Derived:
        """`found`, with new lists for the sequences `full`, bool `[B]`."""
        rows = full.nonzero()[:, 0]
        if not len(rows):
            return found
        fresh, old = self.ranked(q[rows], store.select(rows), step), found.tensors["order"]
        order = old.new_full((*old.shape[:2], max(old.shape[2], fresh.shape[2])), -1)
        order[:, :, : old.shape[2]] = old
        order[rows] = torch.nn.functional.pad(fresh, (0, order.shape[2] - fresh.shape[2]), value=-1)
        query = torch.where(full[:, None, None], q[:, :, -1], found.tensors["query"])
        lengths = torch.where(full[:, None], store.lengths, found.tensors["lengths"])
        return Derived(store.changes, {"order": order, "query": query, "lengths": lengths, "full": full})

    def _unlike(self, q: Tensor, before: Tensor) -> Tensor:
        """Whether each sequence's query differs enough from that of its last full step, bool `[B]`."""
        if self.similarity is None:
            return torch.ones_like(q[:, 0, 0, 0], dtype=torch.bool)
        return torch.cosine_similarity(q[:, :, 0], before, dim=-1).mean(1) < self.similarity


__all__ = ["Recycled"]
