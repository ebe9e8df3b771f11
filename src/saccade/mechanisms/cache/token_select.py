"""TokenSelect: heads vote softly for the tokens that all of them read, and like queries read like tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._derived import Derived, StepSelection, key_nbytes, listed, recall, slots_of
from saccade.mechanisms.cache.base import Step, best
from saccade.mechanisms.cache.forms import Forms, flags, floats
from saccade.mechanisms.cache.reading import score_stored
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern, TokenIndex


@register(
    "token_select",
    Kind.CACHE_POLICY,
    summary="Decoding reads the tokens that get the most softmax votes of all heads, chosen anew when queries change.",
    papers=(
        (
            "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level "
            "KV Cache Selection"
        ),
    ),
    year=2024,
    code="pzs19/TokenSelect",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"chunks", "gqa"}),
    training_free=True,
    exact_when="sinks + tokens + local >= N",
    complexity="N",
    effects=frozenset({"selecting"}),
    deviations=(
        (
            "Prefill is dense; the authors also select for each chunk of a prompt, by its mean query, and renumber "
            "positions to reach past the trained length."
        ),
        (
            "Query head h scores the keys of head h // (H / G), those it attends to; the authors' kernel scores those "
            "of head h mod G."
        ),
        "A choice that was kept is lost, and made anew, where slots move: after eviction.",
    ),
    example={"tokens": 8, "sinks": 2, "local": 4},
    exact=lambda n: {"tokens": n, "sinks": 0, "local": 1},
    ladder=lambda n: tuple({"tokens": max(n // part, 1), "sinks": 1, "local": 4} for part in (32, 16, 8, 4, 2)),
    at_budget=lambda b: {
        "tokens": b.count - b.count // 16 - b.count // 4,
        "sinks": b.count // 16,
        "local": b.count // 4,
    },
)
@dataclass(frozen=True)
class TokenSelect(StepSelection):
    """All heads read the first and last tokens and the `tokens` between them with the most votes. Nothing is evicted.

    Token j's votes are `sum_h softmax_j(q_h k_j^T)` over the tokens between, maxima over `kernel` neighbours.
    While the cosine of a sequence's query, all heads in one vector, to the query of its last choice is at least
    `similarity`, that choice is read again: a step then costs its tokens, else all keys between as well.

    Args:
        tokens: Tokens chosen for all heads together.
        sinks: First tokens, always read.
        local: Last tokens, always read.
        similarity: Least cosine at which a choice is used again; above 1 never.
        kernel: Neighbours that votes are pooled over, odd; 1 for none.
        dense_layers: First layers that read everything.
    """

    tokens: int = 2048
    sinks: int = 128
    local: int = 512
    similarity: float = 0.9
    kernel: int = 1
    dense_layers: int = 0

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1 token")
        require(self.sinks >= 0, "sinks", self.sinks, "at least 0 tokens")
        require(self.local >= 1, "local", self.local, "at least 1 token")
        require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", self.kernel, "an odd number, at least 1")
        require(self.dense_layers >= 0, "dense_layers", self.dense_layers, "at least 0 layers")

    def derives(self) -> Forms:
        """The last choice, and the query that made it."""
        return {"token_select": {"query": floats("B channels"), "chosen": flags("B n-")}}

    def select(self, q: Tensor, store: KVStore, step: Step) -> TokenIndex | None:
        """Slots for all heads, `[B, 1, 1, K]`; None while they are all."""
        if len(store) <= self.sinks + self.tokens + self.local:
            return None
        positions = store.positions
        same = bool((positions == positions[:, :1]).all())
        require(same, "keep", "other tokens in each head", "a policy that keeps the same in all, they vote together")
        place, present = positions[:, 0], store.present[:, 0]
        fixed = (place < self.sinks) | (place >= store.seen[:, None] - self.local)
        query = q[:, :, 0].flatten(1)
        kept, chosen = recall(store, "token_select"), torch.zeros_like(present)
        like = torch.zeros_like(present[:, 0])
        if kept is not None:
            like = torch.cosine_similarity(query, kept.tensors["query"], dim=-1) >= self.similarity
            chosen[:, : kept.tensors["chosen"].shape[1]] = kept.tensors["chosen"]
            query = torch.where(like[:, None], kept.tensors["query"], query)
        rows = (~like).nonzero()[:, 0]
        if len(rows):
            chosen[rows] = self._vote(q, store, step, rows, present & ~fixed)
        store.derived["token_select"] = Derived(store.changes, {"query": query, "chosen": chosen})
        few = store.lengths[:, :1] <= self.sinks + self.tokens + self.local
        return listed(slots_of((fixed | chosen | few) & present)[:, None], len(store))

    def _vote(self, q: Tensor, store: KVStore, step: Step, rows: Tensor, choice: Tensor) -> Tensor:
        """The slots that heads of these sequences vote for, bool `[rows, n]`, of `choice` `[B, n]`."""
        step.choosing += int(choice[rows].sum()) * store.lengths.shape[1] * key_nbytes(store)
        hidden = ~choice[rows, None]
        part = store if len(rows) == len(q) else store.select(rows)
        weights = score_stored(q[rows], part, scale=1.0)[:, :, 0]  # without the scale, as the authors have it
        votes = weights.masked_fill(hidden, -torch.inf).softmax(-1).sum(1, keepdim=True).nan_to_num(0.0)
        votes = max_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        return best(votes.masked_fill(hidden, -torch.inf), self.tokens)[:, 0]
