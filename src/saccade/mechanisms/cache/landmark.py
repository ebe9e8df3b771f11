"""Landmark Attention, decoding: a query scores the landmarks that end the blocks and reads the best blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._derived import StepSelection, between, key_nbytes, per_query_head
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.reading import WeightedSlots
from saccade.mechanisms.cache.store import KVStore
from saccade.ops.checks import accumulation_dtype, resolve_scale
from saccade.types import Kind, Pattern


@register(
    "landmark",
    Kind.CACHE_POLICY,
    summary="Decoding reads its own block and those whose landmarks score highest, each with its landmark's weight.",
    papers=("Landmark Attention: Random-Access Infinite Context Length for Transformers",),
    year=2023,
    code="epfml/landmark-attention",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"chunks", "gqa"}),
    training_free=False,
    exact_when="block > N",
    complexity="N",
    effects=frozenset({"selecting"}),
    deviations=(
        (
            "A call with several tokens is attended by what the recipe names for it, which should be "
            "`landmark_softmax`, or by plain softmax without a model; the authors retrieve there too."
        ),
        (
            "Tokens keep their positions; the authors place retrieved blocks right before the own one, to reach past "
            "the trained length."
        ),
        (
            "Keys of retrieved blocks are read twice, for the blocks' sums and to attend, and copied and weighted in "
            "PyTorch: no engine adds a number to each score."
        ),
        "Landmarks are every `block`-th token; who feeds the cache puts them there.",
    ),
    example={"block": 8, "blocks": 2},
    exact=lambda n: {"block": n + 1, "blocks": 1},
)
@dataclass(frozen=True)
class Landmark(StepSelection):
    """The grouped softmax of `LandmarkSoftmax` over the own block and the `blocks` best of the earlier ones.

    Per query head the earlier blocks with the largest `q k^T` of their landmarks l are read. A token of one has the
    weight `exp(s_j + s_l - log sum_block exp s) / Z`, one of the own block `exp(s_j) / Z`; landmarks have none. Nothing
    is evicted. A step costs all landmarks' keys, its tokens, and the retrieved keys once more.

    Args:
        block: Tokens of a block, the landmark at its end included; 51 in the authors' LLaMA.
        blocks: Earlier blocks that are read per query head.
        dense_layers: First layers that read everything, in plain softmax.
    """

    block: int = 51
    blocks: int = 4
    dense_layers: int = 0

    def __post_init__(self) -> None:
        require(self.block >= 2, "block", self.block, "at least 2, a token and its landmark")
        require(self.blocks >= 1, "blocks", self.blocks, "at least 1 block")
        require(self.dense_layers >= 0, "dense_layers", self.dense_layers, "at least 0 layers")

    def select(self, q: Tensor, store: KVStore, step: Step) -> WeightedSlots:
        """Slots to read `[B, H, K]`; those of earlier blocks with what their landmark adds to their score."""
        complete = store.complete
        require(complete, "keep", "tokens were evicted", "a policy that keeps all, landmarks are known by their place")
        store.sort()
        heads, size = q.shape[1], self.block
        earlier = torch.div(store.seen - 1, size, rounding_mode="floor").clamp(min=0)  # blocks before the query's
        own = between(earlier * size, store.seen)
        own = own.masked_fill(own % size == size - 1, -1)[:, None].expand(-1, heads, -1)
        ends = between(torch.zeros_like(earlier), earlier * size)[:, size - 1 :: size]
        gates = self._scores(q, store, ends[:, None].expand(-1, store.lengths.shape[1], -1), step)
        gate, chosen = gates.topk(min(self.blocks, gates.shape[2]), dim=-1)
        tokens = chosen[..., None] * size + torch.arange(size - 1, device=q.device)
        tokens = tokens.masked_fill((gate == -torch.inf)[..., None], -1)
        sums = self._scores(q, store, tokens.flatten(2), step).view(tokens.shape).logsumexp(-1)
        bias = (gate - sums).masked_fill(gate == -torch.inf, 0.0)[..., None].expand(tokens.shape)
        bias = torch.cat([bias.flatten(2), bias.new_zeros(own.shape)], -1)
        return WeightedSlots(torch.cat([tokens.flatten(2), own], -1), bias)

    def _scores(self, q: Tensor, store: KVStore, slots: Tensor, step: Step) -> Tensor:
        """`q k^T * scale` of listed slots, `[B, G or H, K]`, for each query head, `[B, H, K]`; -inf for none."""
        step.choosing += int((slots >= 0).sum()) * key_nbytes(store)
        keys, wide = store.gather(slots)[0], q.to(accumulation_dtype(q.dtype))
        grouped = wide[:, :, 0].unflatten(1, (slots.shape[1], -1)) @ keys.to(wide.dtype).transpose(-1, -2)
        scaled = grouped.flatten(1, 2) * resolve_scale(step.scale, q.shape[3])
        return scaled.masked_fill(per_query_head(slots, q) < 0, -torch.inf)


__all__ = ["Landmark"]
