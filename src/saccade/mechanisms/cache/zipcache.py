"""ZipCache: tokens that receive much attention for how often they could are packed in more bits than the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._packed import PackedStore, Packing
from saccade.mechanisms.cache.base import CachePolicy, Step, best
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.mechanisms.cache.weights import SCORE_ELEMENTS
from saccade.ops.checks import accumulation_dtype, resolve_scale
from saccade.types import Kind, Pattern


@register(
    "zipcache",
    Kind.CACHE_POLICY,
    summary="Packs tokens in blocks, those with the most attention per query that saw them in more bits.",
    papers=("ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification",),
    year=2024,
    code="ThisisBillhe/ZipCache",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="block > N",
    complexity="N",
    effects=frozenset({"packing"}),
    deviations=(
        (
            "Scales of key channels and norms of value channels are those of a group of tokens of one kind, where the "
            "authors have one for all tokens of a kind; a token is packed once, where their code packs everything anew "
            "every `block` tokens. What a prompt has beyond whole blocks waits for the next block."
        ),
        (
            "Saliency divides by the number of probes that see a token, as the paper does; the authors' code divides "
            "a prompt's by the number of all queries that do."
        ),
        (
            "While decoding, a block has recent and random probes as a prompt has. The authors' code has one, the "
            "token that completes the block: so it is here with both shares 0."
        ),
        (
            "The salient are a set share of a block, as in the authors' LLaMA; their Mistral takes as many of a prompt "
            "as hold 95 % of its attention, and a packed block would no longer have one size."
        ),
        "Random probes are drawn by a hash of their position, so that a run can be repeated.",
        (
            "A prompt attends in full precision and is packed afterwards: chunks and steps differ from the whole. Does "
            "not compose with policies that evict or select."
        ),
    ),
    example={"block": 10},
    exact=lambda n: {"block": n + 1},
    ladder=lambda n: tuple(
        {"bits": bits, "salient_bits": salient, "block": max(n // 4, 2)} for bits, salient in ((2, 4), (4, 4), (4, 8))
    ),
    at_budget=lambda b: (
        None if b.part < 0.25 else {"bits": 2, "salient_bits": 4} if b.part < 0.4 else {"bits": 4, "salient_bits": 8}
    ),
)
@dataclass(frozen=True)
class ZipCache(CachePolicy):
    """Each `block` tokens are packed together: of every head the salient in more bits, the others in few.

    Saliency of token j is the softmax attention it receives from probes i, over the number of probes that see it,
    `sum_i A[i, j] / #{i: i >= j}`, added over the query heads that share its key. Probes are the last `recent_probes`
    of a call with several tokens, or of a block when decoding, and as many as `random_probes` of the others. Keys are
    quantised by channel; values by token, after each channel was divided by the square root of its largest size.

    Args:
        bits: Of the other tokens' codes: 2, 4 or 8.
        salient_bits: Of the salient ones'.
        salient: Share of tokens that are salient.
        block: Tokens that are packed together.
        recent_probes: Share of queries.
        random_probes: Share of the other queries.
    """

    bits: int = 2
    salient_bits: int = 4
    salient: float = 0.6
    block: int = 100
    recent_probes: float = 0.05
    random_probes: float = 0.05
    stats: ClassVar[tuple[str, ...]] = ("attention", "probes")
    needs_lse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("bits", "salient_bits"):
            require(getattr(self, name) in (2, 4, 8), name, getattr(self, name), "2, 4 or 8")
        require(self.block >= 2, "block", self.block, "at least 2 tokens")
        for name in ("salient", "recent_probes", "random_probes"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share in [0, 1]")
        most = self._salient
        require(0 < most < self.block, "salient", self.salient, f"at least one token of block={self.block}, not all")

    @property
    def _salient(self) -> int:
        """Salient tokens of a block."""
        return round(self.salient * self.block)

    def storage(self) -> Storage:
        """Of tokens that are not packed yet."""
        return Storage(page=min(self.block, 64))

    def store(self) -> PackedStore:
        """With salient and other groups."""
        counts = ((self.salient_bits, self._salient), (self.bits, self.block - self._salient))
        kinds = [Packing(bits, count, normalise=True) for bits, count in counts]
        return PackedStore(self.storage(), kinds, self.stats)

    def settle(self, q: Tensor, store: KVStore, step: Step) -> None:
        """Let this call's probes vote, and pack whole blocks of the oldest tokens."""
        rows = self._probes(q, store)
        if bool(rows.any()):
            attention, seen = probe_attention(q, store, step, rows)
            store.set_stat("attention", store.stat("attention") + attention)
            store.set_stat("probes", store.stat("probes") + seen)
        blocks = torch.div(store.lengths, self.block, rounding_mode="floor")
        if not isinstance(store, PackedStore) or not bool(blocks.any()):
            return
        store.sort()
        old = torch.arange(len(store), device=blocks.device) < (blocks * self.block)[..., None]
        saliency = store.stat("attention") / store.stat("probes").clamp(min=1)
        salient = best(saliency.masked_fill(~old, -torch.inf), blocks * self._salient)
        store.pack([salient, old & ~salient])

    def _probes(self, q: Tensor, store: KVStore) -> Tensor:
        """Which queries of this call are probes, bool `[B, M]`."""
        queries = q.shape[2]
        place = store.seen[:, None] + torch.arange(-queries, 0, device=q.device)
        if queries == 1:
            last = store.lengths[:, :1] > self.block - self.recent_probes * self.block
            last = last | (store.lengths[:, :1] == self.block)
        else:
            last = torch.arange(queries, device=q.device) >= queries - max(1, math.ceil(self.recent_probes * queries))
        drawn = (place * 2654435761 + 12345) % 2**32 // 2**8 % 10**4 < self.random_probes * 10**4
        return (last | drawn) & (place >= 0)


@torch.no_grad()
def probe_attention(q: Tensor, store: KVStore, step: Step, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention that recent slots receive from some queries of a call, and how many of these see them.

    Args:
        q: `[B, H, M, D]`, queries of the last M slots.
        store: With these slots.
        step: With the `lse` of attention to everything that is held.
        rows: Bool `[B, M]`.

    Returns:
        Two `[B, G, n]`, in fp32 (fp64 for fp64): attention added over queries and the query heads that share a slot,
        and the number of queries.
    """
    if step.lse is None:
        raise ValueError("step.lse=None: expected the log-sum-exp of dense attention")
    batch, heads, queries, dim = q.shape
    keys, slots = store.keys, len(store)
    groups, dtype = keys.shape[1], accumulation_dtype(q.dtype)
    keys = keys.to(dtype).transpose(-1, -2)
    slot, total = torch.arange(slots, device=q.device), keys.new_zeros(batch, groups, slots)
    seen, columns = torch.zeros_like(total), rows.any(0).nonzero()[:, 0]
    for some in columns.split(max(1, SCORE_ELEMENTS // max(1, batch * heads * slots))):
        wide = q[:, :, some].to(dtype).reshape(batch, groups, -1, dim) * resolve_scale(step.scale, dim)
        scores = (wide @ keys).unflatten(2, (heads // groups, len(some)))
        lse = step.lse[:, :, some].to(dtype).reshape(batch, groups, -1, len(some), 1)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # padding gives nothing
        place = store.lengths[..., None] - queries + some
        sees = (slot <= place[..., None]) & rows[:, None, some, None]
        total += torch.exp(scores - lse).masked_fill(~sees[:, :, None], 0.0).sum((2, 3))
        seen += sees.sum(2)
    return total, seen
