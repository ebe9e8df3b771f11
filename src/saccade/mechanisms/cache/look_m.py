"""LOOK-M: what would be evicted is merged into the kept token whose key is most like its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache.base import CachePolicy, Step, best, received_attention
from saccade.mechanisms.cache.merging import key_lengths, merge_slots, nearest_kept
from saccade.mechanisms.cache.store import KVStore
from saccade.types import Kind, Pattern


@register(
    "look_m",
    Kind.CACHE_POLICY,
    summary="Keeps heavy hitters and recent tokens, and merges each other token into the kept one with the likest key.",
    other_papers=(
        "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference",
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    ),
    year=2024,
    code="SUSTechBruce/LOOK-M",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="heavy + recent >= N",
    complexity="N",
    effects=frozenset({"evicting"}),
    deviations=(
        (
            "The paper's other half, that tokens of text go after those of images, is left out: a policy does not know "
            "what a token was. What remains is its merging, on a prompt of text."
        ),
        (
            "Of the paper's rules averaged and weighted merging take all evicted tokens in; the authors' code leaves "
            "those out that are less like a kept token than the average, in parts of the sums."
        ),
        (
            "Keys are merged as they lie in the cache, rotated by their places, as in the authors' code; the merged "
            "key has the place and the accumulated attention of the token that took the others in."
        ),
        (
            "Grouped-query attention, which the authors' code does not have, shares one list per key/value head: the "
            "attention of its query heads is summed. Budgets are tokens; the code's are shares of the prompt."
        ),
        (
            "Prefill is dense and merges afterwards; a prompt fed in chunks merges after each chunk and so differs "
            "from one fed whole, unless the budget is full."
        ),
    ),
    example={"heavy": 8, "recent": 8, "sinks": 2},
    exact=lambda n: {"heavy": n // 2, "recent": n - n // 2},
    ladder=lambda n: tuple({"heavy": max(n // part, 1), "recent": max(n // part, 1)} for part in (32, 16, 8, 4)),
    at_budget=lambda b: {"heavy": b.count - b.count // 2, "recent": b.count // 2},
)
@dataclass(frozen=True)
class LookM(CachePolicy):
    """After each call keep the `recent` last tokens and of the rest the `heavy` best, and merge the others into these.

    The best are the first `sinks` tokens and then those with the largest accumulated attention, as in `H2O`. Let c be a
    kept token and e run over the n evicted ones whose key has its largest cosine with that of c. Then, for keys and for
    values x,

        averaged   x_c <- (x_c + sum_e x_e) / (n + 1)
        pivotal    x_c <- (x_c + sum_e (x_e + x_c) / 2) / (n + 1)
        weighted   x_c <- (x_c + sum_e cos(k_e, k_c) x_e) / (n + 1)

    Args:
        heavy: Tokens kept beside the recent ones, `sinks` included.
        recent: Last tokens kept.
        sinks: First tokens that always stay, as far as `heavy` has room.
        rule: "averaged", "pivotal" or "weighted".
    """

    heavy: int = 512
    recent: int = 512
    sinks: int = 4
    rule: Literal["averaged", "pivotal", "weighted"] = "pivotal"
    stats: ClassVar[tuple[str, ...]] = ("attention", "length")
    needs_lse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.heavy >= 0, "heavy", self.heavy, "at least 0 tokens")
        require(self.recent >= 0, "recent", self.recent, "at least 0 tokens")
        require(self.heavy + self.recent >= 1, "heavy + recent", self.heavy + self.recent, "at least 1 token")
        require(self.sinks >= 0, "sinks", self.sinks, "at least 0 tokens")
        rules = ("averaged", "pivotal", "weighted")
        require(self.rule in rules, "rule", self.rule, "'averaged', 'pivotal' or 'weighted'")

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:
        """Merges, which leaves nothing more to evict."""
        received = store.stat("attention") + received_attention(q, store, step)
        store.set_stat("attention", received)
        if len(store) <= self.heavy + self.recent:
            return None
        positions = store.positions
        recent = positions >= store.seen[:, None, None] - self.recent
        worth = received.masked_fill(positions < self.sinks, torch.inf)
        kept = recent | best(worth.masked_fill(recent | ~store.present, -torch.inf), self.heavy)
        self._merge(store, kept)
        return None

    def _merge(self, store: KVStore, kept: Tensor) -> None:
        """By `rule`, everything that is not kept into what is."""
        lengths = key_lengths(store, store.stat("length"))
        into, likeness = nearest_kept(store, kept, lengths)
        going = (~kept & store.present).to(likeness.dtype)
        guests = torch.zeros_like(going).scatter_add_(2, into, going)  # n of each slot
        store.set_stat("length", lengths.masked_fill(guests > 0, 0.0))  # their keys are about to change
        if self.rule == "averaged":
            merge_slots(store, into)
        elif self.rule == "pivotal":
            merge_slots(store, into, torch.where(kept, 1 + guests / 2, 0.5))
        else:
            merge_slots(store, into, likeness, guests + 1)
