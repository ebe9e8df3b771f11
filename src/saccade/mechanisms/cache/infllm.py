"""InfLLM: the past in blocks, each known by a few representative tokens; a query reads the blocks nearest to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._derived import (
    Derived,
    StepSelection,
    add_to_stat,
    between,
    key_nbytes,
    listed,
    recall,
    scores,
)
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.forms import Forms, counts, floats
from saccade.mechanisms.cache.store import KVStore
from saccade.ops.checks import accumulation_dtype
from saccade.types import Kind, Pattern, TokenIndex

BLOCKS = "representatives"


@register(
    "infllm",
    Kind.CACHE_POLICY,
    summary="Decoding reads first and last tokens and the blocks whose representative tokens score highest.",
    other_papers=("InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",),
    year=2024,
    code="thunlp/InfLLM",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"chunks", "gqa"}),
    training_free=True,
    exact_when="blocks * block >= N",
    complexity="N",
    effects=frozenset({"selecting"}),
    heads_share=True,
    deviations=(
        (
            "A token's relevance is the paper's mean of `q k^T` over the `local` next queries; the authors' code sums "
            "softmax weights over queries in whose local window the token is, itself included."
        ),
        (
            "Representative tokens are those of a key/value head, by the sum over its query heads; the authors expand "
            "grouped-query attention and choose some for each query head. Blocks are chosen for all heads together, by "
            "the mean of their representatives' keys, as in their code."
        ),
        (
            "Retrieved tokens keep their positions; the authors store keys without and place all tokens beyond the "
            "local window at one distance, to reach past the trained length."
        ),
        "A call with several tokens is dense; the authors let a prompt retrieve for each 512 queries.",
        (
            "Blocks stay in the same memory as everything; the authors keep them on the host and the least recently "
            "used on the device."
        ),
        (
            "Where tokens are evicted, blocks are of those that are left, and representatives are found anew. Queries "
            "of tokens that are taken back go on counting."
        ),
    ),
    example={"blocks": 2, "block": 4, "representatives": 2, "sinks": 2, "local": 6},
    exact=lambda n: {"blocks": n, "block": 4, "representatives": 1, "sinks": 2, "local": 4},
    ladder=lambda n: tuple(
        {"blocks": max(n // (4 * part), 1), "block": 4, "representatives": 2, "sinks": 1, "local": 4}
        for part in (16, 8, 4, 2)
    ),
    at_budget=lambda b: {
        "block": (block := 32 if b.count < 1024 else 128),
        "sinks": b.count // 16,
        "local": b.count // 4,
        "blocks": max(1, (b.count - b.count // 16 - b.count // 4) // block),
    },
)
@dataclass(frozen=True)
class InfLLM(StepSelection):
    """All heads read the first and last tokens and the `blocks` blocks of earlier ones nearest to their queries.

    Token m's relevance is `r_m = 1 / local * sum_{j=1..local} q_{m+j} k_m^T`, complete when it leaves the local window.
    Then each `block` tokens make a block, which their `representatives` most relevant stand for; a query's similarity
    to it is `sum_h q_h mean_r(k_r)^T`. What has left the window and fills no block yet is read as well. Nothing is
    evicted. A step costs its tokens, one key for each block, and the keys of the window once more.

    Args:
        blocks: Blocks that are read.
        block: Tokens of a block.
        representatives: Tokens that stand for a block.
        sinks: First tokens, always read, in no block.
        local: Last tokens, always read.
        dense_layers: First layers that read everything.
    """

    blocks: int = 16
    block: int = 128
    representatives: int = 4
    sinks: int = 128
    local: int = 4096
    dense_layers: int = 0
    stats: ClassVar[tuple[str, ...]] = ("relevance",)

    def __post_init__(self) -> None:
        require(self.blocks >= 1, "blocks", self.blocks, "at least 1 block")
        require(self.block >= 1, "block", self.block, "at least 1 token")
        within = 1 <= self.representatives <= self.block
        require(within, "representatives", self.representatives, f"1 to block={self.block} tokens")
        require(self.sinks >= 0, "sinks", self.sinks, "at least 0 tokens")
        require(self.local >= 1, "local", self.local, "at least 1 token")
        require(self.dense_layers >= 0, "dense_layers", self.dense_layers, "at least 0 layers")

    def derives(self) -> Forms:
        """What stands for blocks."""
        return {BLOCKS: {"keys": floats("B G blocks D"), "full": counts("B", "blocks")}}

    def select(self, q: Tensor, store: KVStore, step: Step) -> TokenIndex | None:
        """Slots for all query heads of a key/value head, `[B, G, 1, K]`; None while they are all."""
        store.sort()
        lengths = store.lengths
        full = torch.div(lengths.amin(1) - 1 - self.local - self.sinks, self.block, rounding_mode="floor").clamp(min=0)
        if int(full.max()) <= self.blocks:
            return None
        keys = self._block_keys(store, full, step)
        step.choosing += int(full.sum()) * keys[0, :, 0].nbytes
        number = torch.arange(keys.shape[2], device=q.device)
        ranks = scores(q, keys).sum(1).masked_fill(number >= full[:, None], -torch.inf)
        highest, chosen = ranks.topk(min(self.blocks, len(number)), dim=-1)
        inside = torch.arange(self.block, device=q.device)
        slots = self.sinks + chosen[..., None] * self.block + inside
        slots = slots.masked_fill(highest[..., None] == -torch.inf, -1).flatten(1)[:, None].expand(*lengths.shape, -1)
        first = between(torch.zeros_like(lengths), lengths.clamp(max=self.sinks))
        rest = between((self.sinks + full * self.block)[:, None].expand_as(lengths), lengths)
        return listed(torch.cat([first, slots, rest], -1), len(store))

    def settle(self, q: Tensor, store: KVStore, step: Step) -> None:
        """Add this call's queries to the relevance of the tokens before them."""
        if step.layer < self.dense_layers:
            return
        queries, dim = q.shape[2:]
        store.sort()
        slots = between((store.lengths - self.local - queries).clamp(min=0), store.lengths)
        place = slots if store.complete else store.positions.gather(2, slots.clamp(min=0))
        start = (store.seen - queries)[:, None, None]  # below 0 by as much as the call was padded
        shown = torch.arange(queries, device=q.device) + start[:, 0] >= 0
        asked = q.to(accumulation_dtype(q.dtype)).unflatten(1, (slots.shape[1], -1)).sum(2)
        asked = asked.masked_fill(~shown[:, None, :, None], 0.0)
        sums = torch.nn.functional.pad(asked.cumsum(2), (0, 0, 1, 0))  # of the queries before each
        after, last = (
            (place + ahead - start).clamp(0, queries)[..., None].expand(-1, -1, -1, dim)
            for ahead in (1, 1 + self.local)
        )
        asked = sums.gather(2, last) - sums.gather(2, after)
        keys = store.gather(slots)[0].to(asked.dtype)
        step.choosing += int((slots >= 0).sum()) * key_nbytes(store)
        add_to_stat(store, "relevance", slots, (keys * asked).sum(-1) / self.local)

    def _block_keys(self, store: KVStore, full: Tensor, step: Step) -> Tensor:
        """Mean key of each block's representatives, `[B, G, blocks, D]`, kept; past `full` `[B]` anything."""
        kept = recall(store, BLOCKS)
        before = torch.zeros_like(full) if kept is None else kept.tensors["full"]
        heads, dim, new = store.lengths.shape[1], store.dims[0], between(before, full)
        none = torch.zeros(len(full), heads, 0, dim, dtype=store.dtype, device=full.device)
        means = none if kept is None else kept.tensors["keys"]
        if new.shape[1]:
            slots = self.sinks + new[..., None] * self.block + torch.arange(self.block, device=full.device)
            slots = slots.masked_fill(new[..., None] < 0, -1)[:, None].expand(-1, heads, -1, -1)
            relevance = store.stat("relevance").gather(2, slots.flatten(2).clamp(min=0)).view(slots.shape)
            best = slots.gather(3, relevance.topk(self.representatives, dim=-1).indices)
            keys = store.gather(best.flatten(2))[0].unflatten(2, best.shape[2:])
            step.choosing += int((best >= 0).sum()) * key_nbytes(store)
            means = torch.nn.functional.pad(means, (0, 0, 0, int(full.max()) - means.shape[2]))
            row, column = (new >= 0).nonzero(as_tuple=True)
            means[row, :, new[row, column]] = keys.mean(3).to(means.dtype)[row, :, column]
        store.derived[BLOCKS] = Derived(store.changes, {"keys": means, "full": full})
        return means


__all__ = ["InfLLM"]
