"""RetrievalAttention: decoding finds the keys it reads in an index that the prompt's queries made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._derived import Derived, StepSelection, between, listed, per_query_head, recall
from saccade.mechanisms.cache._query_graph import build, search
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern, TokenIndex

INDEX = "query graph"


@register(
    "retrieval_attention",
    Kind.CACHE_POLICY,
    summary="Decoding searches an index over keys, made from the prompt's queries, and reads what it finds.",
    other_papers=("RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval",),
    year=2024,
    code="microsoft/RetrievalAttention",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"selecting"}),
    deviations=(
        (
            "Queries are linked with the keys they score highest, as in the paper; a search goes from key to key "
            "through them, where the authors first project these links onto the keys and prune them."
        ),
        (
            "The index is built of `samples` queries of each key/value head, scored exactly against all keys, and the "
            "search runs for all heads at once in PyTorch. Libraries of nearest neighbours build their graphs from the "
            "keys alone, which the paper shows to fail for queries, and do not say how many keys they read."
        ),
        "The index lies beside the store in the same memory, where the authors keep it and the keys on the host.",
        (
            "Tokens decoded after the prompt are all read; another call with several tokens builds the index anew, of "
            "its queries and those kept from before. Before the first such call, and where slots move (eviction, "
            "forks, beams), everything is read."
        ),
        "A search also keeps one bit of each key in mind, whether it was read.",
    ),
    example={
        "tokens": 6, "sinks": 2, "local": 4, "width": 8, "samples": 16, "degree": 4, "links": 2, "expand": 2
    },
    exact=lambda n: {"tokens": n},
    ladder=lambda n: tuple(
        {"tokens": max(n // part, 1), "sinks": 1, "local": 4, "width": max(n // part, 1), "degree": 4}
        for part in (32, 16, 8, 4)
    ),
    at_budget=lambda b: {
        "tokens": (tokens := b.count - b.count // 16 - b.count // 4), "sinks": b.count // 16, "local": b.count // 4,
        "width": max(128, tokens),
    },
)  # fmt: skip
@dataclass(frozen=True)
class RetrievalAttention(StepSelection):
    """A query head reads the first and last tokens of the prompt, all since, and the `tokens` keys that it finds.

    Queries are not distributed as keys are, so keys that are near to each other say little about where a query finds
    its best; queries do. Each of `samples` queries of the prompt is linked with the `degree` keys it scores highest,
    each key with the `links` queries that score it highest, and a best-first search (`_query_graph.search`) starts at
    the keys that the mean query scores highest. Nothing is evicted.

    Args:
        tokens: Tokens read per query head beside the first, the last and the new ones; 100 in the paper.
        sinks: First tokens, always read.
        local: Last tokens of the prompt, always read.
        width: Keys that a search keeps, at least `tokens` of them: more finds more and reads more.
        samples: Queries per key/value head that the index is made of.
        degree: Keys linked with a query.
        links: Queries linked with a key.
        expand: Keys whose neighbours are looked at in one round of a search.
        dense_layers: First layers that read everything.
    """

    tokens: int = 100
    sinks: int = 128
    local: int = 512
    width: int = 128
    samples: int = 2048
    degree: int = 32
    links: int = 2
    expand: int = 16
    dense_layers: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "width", "samples", "degree", "links", "expand"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("sinks", "local"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0 tokens")
        require(self.dense_layers >= 0, "dense_layers", self.dense_layers, "at least 0 layers")

    def select(self, q: Tensor, store: KVStore, step: Step) -> TokenIndex | None:
        """Slots of each query head, `[B, H, 1, K]`; None while they are all, or there is no index."""
        kept = recall(store, INDEX)
        if kept is None or int(kept.tensors["lengths"].max()) <= self.sinks + self.tokens + self.local:
            return None
        lengths, indexed = per_query_head(store.lengths, q), per_query_head(kept.tensors["lengths"], q)
        first = indexed.clamp(max=self.sinks)
        last = (indexed - self.local).maximum(first)
        found = search(q, store, kept.tensors, max(self.width, self.tokens), self.expand, step)
        inside = (found >= first[..., None]) & (found < last[..., None])
        found = found.masked_fill(~inside | (inside.cumsum(-1) > self.tokens), -1)
        always = between(torch.zeros_like(first), first), between(last, lengths)
        return listed(torch.cat([found, *always], -1), len(store))

    def settle(self, q: Tensor, store: KVStore, step: Step) -> None:
        """After a prompt, or a part of one: the index, of its queries and those kept from before."""
        if q.shape[2] == 1 or step.layer < self.dense_layers:
            return
        queries = q.unflatten(1, (store.lengths.shape[1], -1)).transpose(2, 3)
        places = store.seen[:, None] + torch.arange(-q.shape[2], 0, device=q.device)  # below 0 for padding
        share = queries.shape[3]
        pool, places = _sampled(queries, places.clamp(min=-1), max(1, self.samples // share))
        pool, places = pool.flatten(2, 3), places.repeat_interleave(share, 1)
        kept = recall(store, INDEX)
        if kept is not None:
            pool = torch.cat([kept.tensors["queries"], pool], 2)
            places = torch.cat([kept.tensors["places"], places], 1)
            pool, places = _sampled(pool, places, self.samples)
        graph = build(pool, places, store, self.degree, self.links)
        own = {"queries": pool, "places": places, "lengths": store.lengths}
        store.derived[INDEX] = Derived(store.changes, graph | own)


def _sampled(queries: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` queries of `[B, G, S, ..]`, evenly spaced in each sequence, the last among them, and places.

    Places `[B, S]` are -1 for what is no query; those that are come first.
    """
    known = places >= 0
    order = (~known).to(torch.uint8).argsort(dim=1, stable=True)
    have = known.sum(1, keepdim=True)
    number = torch.arange(1, min(count, places.shape[1]) + 1, device=places.device)
    chosen = torch.div(number * have, have.clamp(min=1, max=count), rounding_mode="floor") - 1
    real = number <= have
    chosen = order.gather(1, chosen.clamp(min=0, max=places.shape[1] - 1))
    row = torch.arange(len(places), device=places.device)[:, None]
    return queries.transpose(1, 2)[row, chosen].transpose(1, 2), places.gather(1, chosen).masked_fill(~real, -1)


__all__ = ["RetrievalAttention"]
