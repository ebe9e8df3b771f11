"""Recycled Attention: now and then a token attends fully, the tokens after it read what it attended to most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._derived import Derived, between, key_nbytes, listed, recall
from saccade.mechanisms.cache._votes import pooled
from saccade.mechanisms.cache.base import CachePolicy, Step
from saccade.mechanisms.cache.forms import Forms, counts, flags, floats, slot_numbers
from saccade.mechanisms.cache.reading import score_stored
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern, TokenIndex

LIST = "recycled"


@register(
    "recycled",
    Kind.CACHE_POLICY,
    summary="Decoding reads the tokens that the last full step attended to most; a full step comes by stride or need.",
    papers=("Recycled Attention: Efficient inference for long-context language models",),
    other_papers=("RefreshKV: Updating Small KV Cache During Long-form Generation",),
    year=2024,
    code="carriex/refreshkv",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"chunks", "gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"selecting"}),
    heads_share=True,
    deviations=(
        (
            "The rule is that of the paper's later version, RefreshKV; its code could not be read. `kernel=1` ranks by "
            "single weights, as the first version has it."
        ),
        (
            "The authors copy the recycled tokens to a second, small cache; here a list says where they lie, and the "
            "engine reads them in place."
        ),
        "A full step scores its keys once to attend and once to rank, as the authors do beside FlashAttention.",
        (
            "A list is lost where slots move, after eviction: the next step is full. A call with several tokens is "
            "dense, and its last token makes the list."
        ),
    ),
    example={"tokens": 8, "stride": 3, "similarity": None, "kernel": 3},
    exact=lambda n: {"tokens": n},
    ladder=lambda n: tuple(
        {"tokens": max(n // part, 1), "stride": 5, "similarity": None, "kernel": 1} for part in (32, 16, 8, 4, 2)
    ),
    at_budget=lambda b: {"tokens": b.count, "stride": 10, "similarity": 0.85},
)
@dataclass(frozen=True)
class Recycled(CachePolicy):
    """Between full steps, a key/value head reads `tokens` tokens: the best of the last full step, and all since.

    A full step ranks tokens by its softmax weights, the greatest among the query heads that share a key and among
    `kernel` neighbours. Each token that is decoded then joins the list, and the one with the least weight leaves it.
    Nothing is evicted. Every `stride`-th step is full; with `similarity` it is only if the cosine of the mean of its
    queries over heads to that of the last full step is below. Layers and sequences decide for themselves.

    Args:
        tokens: Tokens that a recycled step reads per key/value head, K in the paper.
        stride: Steps from one full step, or look at the queries, to the next; the paper has 5 and 10 for looks.
        similarity: Least cosine at which a list is used on, 0.85 for Llama-3.1-8B and 0.95 for Qwen2-7B in the paper;
            None for a fixed stride, with `stride=1` dense attention.
        kernel: Neighbours that weights are pooled over, odd; 1 for none.
    """

    tokens: int = 4096
    stride: int = 10
    similarity: float | None = 0.85
    kernel: int = 7

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1 token")
        require(self.stride >= 1, "stride", self.stride, "at least 1 step")
        fits = self.similarity is None or -1 <= self.similarity <= 1
        require(fits, "similarity", self.similarity, "a cosine from -1 to 1, or None")
        require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", self.kernel, "an odd number, at least 1")

    def derives(self) -> Forms:
        """The list, and the query and the lengths of the full step that made it."""
        made = {"query": floats("B D"), "lengths": counts("B G"), "full": flags("B")}
        return {LIST: {"order": slot_numbers("B G listed"), **made}}

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
        tensors = {"order": self.ranked(q, store, step), "query": q[:, :, -1].mean(1)}
        store.derived[LIST] = Derived(store.changes, {**tensors, "lengths": store.lengths, "full": full})

    def ranked(self, q: Tensor, store: KVStore, step: Step) -> Tensor:
        """Slots by their pooled weight for the last query, greatest and earliest first, `[B, G, min(tokens, n)]`."""
        step.choosing += int(store.lengths.sum()) * key_nbytes(store)
        weights = score_stored(q[:, :, -1:], store, scale=step.scale).softmax(-1)
        hidden = ~store.present
        received = weights[:, :, 0].unflatten(1, (store.lengths.shape[1], -1)).amax(2).masked_fill(hidden, -torch.inf)
        received = pooled(received, self.kernel, "max").masked_fill(hidden, -torch.inf)
        highest, order = received.sort(dim=-1, descending=True, stable=True)  # neighbours are equal where pooled
        return order.masked_fill(highest == -torch.inf, -1)[:, :, : self.tokens]

    def _renewed(self, found: Derived, q: Tensor, store: KVStore, step: Step, full: Tensor) -> Derived:
        """`found`, with new lists for the sequences `full`, bool `[B]`."""
        rows = full.nonzero()[:, 0]
        if not len(rows):
            return found
        fresh, old = self.ranked(q[rows], store.select(rows), step), found.tensors["order"]
        order = old.new_full((*old.shape[:2], max(old.shape[2], fresh.shape[2])), -1)
        order[:, :, : old.shape[2]] = old
        order[rows] = torch.nn.functional.pad(fresh, (0, order.shape[2] - fresh.shape[2]), value=-1)
        query = torch.where(full[:, None], q[:, :, -1].mean(1), found.tensors["query"])
        lengths = torch.where(full[:, None], store.lengths, found.tensors["lengths"])
        return Derived(store.changes, {"order": order, "query": query, "lengths": lengths, "full": full})

    def _unlike(self, q: Tensor, before: Tensor) -> Tensor:
        """Whether each sequence's query differs enough from that of its last full step, bool `[B]`."""
        if self.similarity is None:
            return torch.ones_like(q[:, 0, 0, 0], dtype=torch.bool)
        return torch.cosine_similarity(q[:, :, 0].mean(1), before, dim=-1) < self.similarity


__all__ = ["Recycled"]
