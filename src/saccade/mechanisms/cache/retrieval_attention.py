"""RetrievalAttention: decoding finds the keys it reads in an index that the prompt's queries made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import Budget, register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._derived import Derived, StepSelection, between, per_query_head, recall
from saccade.mechanisms.cache._query_graph import FORM, build, search
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.forms import Forms, counts, floats, slot_numbers
from saccade.mechanisms.cache.store import KVStore
from saccade.ops import KeyGraph
from saccade.types import Kind, Pattern, TokenIndex

INDEX = "query graph"

LONG = 4096
"""Tokens from which on an index needs more keys of a query."""


def _at_budget(b: Budget) -> dict[str, int]:
    """A quarter of the budget is searched for, a sixteenth are first tokens and the rest the last.

    Measured with SmolLM2's queries and keys (layers 3, 14, 25; budgets of half, a quarter and a tenth): of 2,048 tokens
    such a search scores 50, 48 and 32 % of the keys and finds 97, 96 and 90 % of the best; of 8,192 tokens 49, 36 and
    23 %, and 97, 94 and 94 %. What is read then has at most 0.3 % of the attention less than the best has. Half the
    degree at 8,192 tokens scores 37, 24 and 14 % and finds 76 to 79 %. At 2,048 tokens four times the samples and two
    thirds of the degree find about as much for as much, in a larger index. A search for 11/16 of the budget brings at
    most 0.9 % of the attention more, and scores 51 to 78 % of 2,048 keys.
    """
    tokens, sinks = b.count // 4, b.count // 16
    return {
        "tokens": tokens, "sinks": sinks, "local": b.count - tokens - sinks, "width": tokens,
        "samples": min(2048, max(64, b.tokens // 4)), "degree": 64 if b.tokens > LONG else 48,
        "expand": max(16, tokens // 4),
    }  # fmt: skip


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
            "Queries are linked with the keys they score highest, and keys with the query that scores them highest; a "
            "search goes from key to key through these links, where the authors first project them onto the keys and "
            "prune what a key has. It ends as theirs does, when no key is left among the `width` best whose neighbours "
            "were not looked at; they look at those of one key at a time, here of `expand`."
        ),
        (
            "The index is built of `samples` queries of each key/value head, scored exactly against all keys but the "
            "first and last, which are read in any case. Libraries of nearest neighbours build their graphs from the "
            "keys alone, which the paper shows to fail for queries, and do not say how many keys they read."
        ),
        "The index lies beside the store in the same memory, where the authors keep it and the keys on the host.",
        (
            "Tokens decoded after the prompt are all read; another call with several tokens builds the index anew, of "
            "its queries and those kept from before. Before the first such call, and where slots move, after "
            "eviction, everything is read."
        ),
        (
            "The paper searches for 100 of 128,000 tokens, a small part of 640 that are always read: settings at a "
            "budget search for a quarter of it. A search for more looks at most keys: see the comment there."
        ),
        (
            "A key that none of the sampled queries has in its list is never found; the authors add links until every "
            "key can be reached."
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
    at_budget=_at_budget,
)  # fmt: skip
@dataclass(frozen=True)
class RetrievalAttention(StepSelection):
    """A query head reads the first and last tokens of the prompt, all since, and the `tokens` keys that it finds.

    Queries are not distributed as keys are, so keys that are near to each other say little about where a query finds
    its best; queries do. Each of `samples` queries of the prompt is linked with the `degree` keys it scores highest,
    each key with the `links` queries that score it highest, and a best-first search (`saccade.ops.search_graph`) starts
    at the keys that the mean query scores highest. Only keys between the first and the last are in the index. Nothing
    is evicted.

    Args:
        tokens: Tokens read per query head beside the first, the last and the new ones; 100 in the paper.
        sinks: First tokens, always read.
        local: Last tokens of the prompt, always read.
        width: Keys that a search keeps, at least `tokens` of them: more finds more and reads more.
        samples: Queries per key/value head that the index is made of.
        degree: Keys linked with a query.
        links: Queries linked with a key. More links, like more `degree`, find more and read more; with the same reading
            one link and a greater degree found more.
        expand: Keys whose neighbours are looked at in one round of a search: fewer read a little less, in more rounds.
        dense_layers: First layers that read everything.
    """

    tokens: int = 100
    sinks: int = 128
    local: int = 512
    width: int = 128
    samples: int = 2048
    degree: int = 64
    links: int = 1
    expand: int = 32
    dense_layers: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "width", "samples", "degree", "links", "expand"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("sinks", "local"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0 tokens")
        require(self.dense_layers >= 0, "dense_layers", self.dense_layers, "at least 0 layers")

    def derives(self) -> Forms:
        """The index, and the queries that made it."""
        own = {"queries": floats("B G S D"), "places": slot_numbers("B S", "seen"), "lengths": counts("B G")}
        return {INDEX: {**FORM, **own}}

    def select(self, q: Tensor, store: KVStore, step: Step) -> TokenIndex | None:
        """Slots of each query head, `[B, H, 1, K]`; None while they are all, or there is no index."""
        kept = recall(store, INDEX)
        if kept is None or int(kept.tensors["lengths"].max()) <= self.sinks + self.tokens + self.local:
            return None
        first, last = self._borders(kept.tensors["lengths"])
        graph = KeyGraph(*(kept.tensors[name] for name in KeyGraph._fields))
        found = search(q, store, graph, max(self.width, self.tokens), self.expand, step)[..., : self.tokens]
        before, after = between(torch.zeros_like(first), first), between(last, store.lengths)
        slots = torch.cat([per_query_head(before, q), found.sort(-1).values, per_query_head(after, q)], -1)
        return TokenIndex(slots[:, :, None], 1, len(store))

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
        first, last = self._borders(store.lengths)
        slot = torch.arange(len(store), device=q.device)
        inside = (slot >= first[..., None]) & (slot < last[..., None])
        graph = build(pool, places, store, inside, self.degree, self.links)._asdict()
        own = {"queries": pool, "places": places, "lengths": store.lengths}
        store.derived[INDEX] = Derived(store.changes, graph | own)

    def _borders(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The first slot that is searched for and the end of these, of heads with so many tokens at the last index."""
        first = lengths.clamp(max=self.sinks)
        return first, (lengths - self.local).maximum(first)


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
