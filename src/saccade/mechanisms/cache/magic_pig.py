"""MagicPIG: keys are sampled by hash tables, and what they were likely to be sampled corrects their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._derived import (
    Derived,
    StepSelection,
    between,
    key_nbytes,
    per_query_head,
    recall,
    room,
    slots_of,
)
from saccade.mechanisms.cache._hash_tables import extend, hashed, met, tables_form, tables_of
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.forms import Forms, floats
from saccade.mechanisms.cache.reading import WeightedSlots
from saccade.mechanisms.cache.store import KVStore
from saccade.ops.checks import accumulation_dtype
from saccade.types import Kind, Pattern

TABLES = "hash tables"

ROWS = 256
"""Vectors that are hashed at once: their projections then lie in a core's cache."""


@register(
    "magic_pig",
    Kind.CACHE_POLICY,
    summary="Decoding reads a sample of keys drawn by locality-sensitive hashing, with weights that make up for it.",
    papers=("MagicPIG: LSH Sampling for Efficient LLM Generation",),
    year=2024,
    code="Infini-AI-Lab/MagicPIG",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"chunks", "gqa"}),
    training_free=True,
    exact_when="bits = 0, tables >= 2",
    complexity="N",
    effects=frozenset({"selecting"}),
    deviations=(
        (
            "Tables lie beside the store in the same memory (2 bytes a table and slot, 4 from 32,768 slots on, and as "
            "much for where a bucket begins), and all tokens of the prompt are in them; the authors keep them and the "
            "keys on the host, without the first and last tokens. The sample is the same."
        ),
        (
            "Sampled keys and values are copied and weighted in PyTorch: no engine adds a number to each score. The "
            "same tokens are read."
        ),
        (
            "Tokens decoded after the prompt are hashed once they leave the local window: their codes are compared "
            "until the tables take them in, many at once; the authors attend to all of them. The mean of keys is that "
            "of all tokens stored when the first is decoded, not of the middle alone."
        ),
        "The authors add 1e-4 to the probability inside the logarithm; here it is exact.",
    ),
    example={"bits": 2, "tables": 3, "sinks": 2, "local": 4, "dense_layers": (0,)},
    exact=lambda _: {"bits": 0, "tables": 2, "dense_layers": ()},
    at_budget=lambda b: {
        "bits": 10 if b.part < 0.2 else 9 if b.part < 0.4 else 8,
        "tables": 150,
        "dense_layers": (0, b.layers // 2) if b.layers > 2 else (),
    },
)
@dataclass(frozen=True)
class MagicPIG(StepSelection):
    """Reads sinks, local tokens and keys whose hash meets the query's in two tables or more. Nothing is evicted.

    A table's hash is the signs of `bits` random projections; key j, less the keys' mean, meets the query in one table
    with probability `p = (1 - angle / pi)^bits`, and in two or more of L with
    `u = 1 - (1 - p)^L - L p (1 - p)^(L - 1)`. A sampled key's score becomes `q k^T scale - log u`, so that sums over
    the sample estimate sums over all keys; `bits = 0` samples all with u = 1. Projections are drawn from `seed`. A step
    looks up one bucket of each table (`_hash_tables.py`); tables are sorted when the first token is decoded.

    Args:
        bits: Bits of a hash, K; at most 15.
        tables: Hash tables, L; 2 or more.
        sinks: First tokens, always read.
        local: Last tokens, always read, the newest included.
        dense_layers: Numbers of the layers that read everything.
        seed: Of the projections.
    """

    bits: int = 10
    tables: int = 150
    sinks: int = 4
    local: int = 64
    dense_layers: tuple[int, ...] = (0, 16)  # type: ignore[assignment]
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.bits <= 15, "bits", self.bits, "0 to 15")
        require(self.tables >= 2, "tables", self.tables, "at least 2, a key must be met twice")
        require(self.sinks >= 0, "sinks", self.sinks, "at least 0 tokens")
        require(self.local >= 1, "local", self.local, "at least 1 token")
        require(all(layer >= 0 for layer in self.dense_layers), "dense_layers", self.dense_layers, "layers from 0")

    def derives(self) -> Forms:
        """The hash tables, and the mean and the lengths of the keys."""
        keys = {"mean": floats("B G 1 D"), "norms": floats("B G n+ 1")}
        return {TABLES: {**tables_form(self.tables, 2**self.bits), **keys}}

    def read(self, q: Tensor, store: KVStore, step: Step) -> WeightedSlots | None:
        """All in dense layers and for several tokens, else a sample."""
        return None if q.shape[2] != 1 or step.layer in self.dense_layers else self.select(q, store, step)

    def first_alike(self, layer: int) -> int:
        """The first that samples, or the first that does not."""
        return next(x for x in range(layer + 1) if (x in self.dense_layers) == (layer in self.dense_layers))

    def select(self, q: Tensor, store: KVStore, step: Step) -> WeightedSlots:
        """Slots to read `[B, H, K]`, and -log u of those that were sampled."""
        kept = self._tables(store, step)
        mean, norms = kept.tensors["mean"], kept.tensors["norms"][..., 0]
        query = q[:, :, 0].to(mean.dtype)
        hits = met(kept.tensors, self.hashes(query), len(store), step)
        positions = store.positions
        always = (positions < self.sinks) | (positions >= store.seen[:, None, None] - self.local)
        slots = slots_of((hits | per_query_head(always, q)) & per_query_head(store.present, q))
        certain = per_query_head(always, q).gather(2, slots.clamp(min=0)) | (slots < 0)
        step.choosing += int((~certain).sum()) * norms.itemsize
        lengths = query.norm(dim=-1, keepdim=True) * per_query_head(norms, q).gather(2, slots.clamp(min=0))
        offset = (query * per_query_head(mean, q)[:, :, 0]).sum(-1, keepdim=True)

        def bias(products: Tensor, heads: slice) -> Tensor:
            tiny = torch.finfo(products.dtype).tiny
            u = self.probability((products - offset[:, heads]) / lengths[:, heads].clamp(min=tiny))
            return -u.clamp(min=tiny).log().masked_fill(certain[:, heads], 0.0)

        return WeightedSlots(slots, bias)

    def hashes(self, x: Tensor) -> Tensor:
        """`[.., D]` to the codes int16 `[.., tables]`."""
        planes = _projections(x.shape[-1], self.bits * self.tables, self.seed, x.dtype, x.device)
        powers = 2 ** torch.arange(self.bits, device=x.device, dtype=x.dtype)
        codes = [
            ((some @ planes > 0).to(x.dtype).unflatten(-1, (self.tables, self.bits)) @ powers).to(torch.int16)
            for some in x.reshape(-1, x.shape[-1]).split(ROWS)
        ]
        return torch.cat(codes).view(*x.shape[:-1], self.tables)

    def probability(self, cosine: Tensor) -> Tensor:
        """Of a key at this cosine to the query to be sampled."""
        once = (1 - torch.arccos(cosine.clamp(-1, 1)) / math.pi) ** self.bits
        return 1 - (1 - once) ** self.tables - self.tables * once * (1 - once) ** (self.tables - 1)

    def _tables(self, store: KVStore, step: Step) -> Derived:
        """Tables of the slots there were when the first token was decoded, and of those that left the window since."""
        kept = recall(store, TABLES)
        if kept is None:
            keys = store.keys.to(accumulation_dtype(store.dtype))
            step.choosing += int(store.lengths.sum()) * key_nbytes(store)
            mean = keys.sum(2, keepdim=True) / store.lengths.clamp(min=1)[..., None, None]
            keys -= mean
            tensors = tables_of(self.hashes(keys), store.lengths, 2**self.bits)
            tensors |= {"mean": mean, "norms": keys.norm(dim=-1, keepdim=True)}
            kept = store.derived[TABLES] = Derived(store.changes, tensors)
        norms = kept.tensors["norms"] = room(kept.tensors["norms"], len(store), 0)
        slots = between(hashed(kept.tensors), store.lengths - self.local)  # what was decoded since lies in order
        if slots.shape[2]:
            entry, head, number = (slots >= 0).nonzero(as_tuple=True)
            step.choosing += len(entry) * key_nbytes(store)
            keys = store.gather(slots)[0].to(norms.dtype) - kept.tensors["mean"]
            norms[entry, head, slots[entry, head, number], 0] = keys.norm(dim=-1)[entry, head, number]
            counts = (slots >= 0).sum(-1)
            kept.tensors |= extend(kept.tensors, self.hashes(keys), counts)
        return kept


@cache
def _projections(dim: int, count: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    planes = torch.randn(dim, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return planes.to(device, dtype)


__all__ = ["MagicPIG"]
