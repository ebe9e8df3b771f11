"""CHAI: heads whose attention is alike share one head's keys, found from the first tokens of each sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache.base import CachePolicy, Step
from saccade.mechanisms.cache.sharing import SharedKeyStore
from saccade.mechanisms.cache.sharing_attention import form_clusters
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.ops.checks import resolve_scale
from saccade.types import Kind, Pattern


@register(
    "chai",
    Kind.CACHE_POLICY,
    summary="Heads whose first tokens attend alike share one head's keys and scores; values stay per head.",
    papers=("CHAI: Clustered Head Attention for Efficient LLM Inference",),
    year=2024,
    code="facebookresearch/chai",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa", "streaming"}),
    training_free=True,
    exact_when="heads = 1",
    complexity="N",
    effects=frozenset({"packing"}),
    heads_differ=True,
    heads_share=True,
    deviations=(
        (
            "The paper has as many keys as queries, and this is then its rule. Where query heads share keys, key/value "
            "heads are clustered, by the attention of all their query heads, and query head i of one attends as query "
            "head i of its leader."
        ),
        (
            "Only keys are shared, as in the paper, so that at most half of the bytes of the cache can be saved; the "
            "paper reports 21.4 % for LLaMA-7B, whose early layers share nothing: give those `heads=1`, a policy each."
        ),
        (
            "The first `warmup` tokens attend with scores of their own, as the paper runs plain attention on them; the "
            "authors' code lets a prompt's first tokens use the clusters that they decide. Where a recipe attends to a "
            "prompt sparsely, clusters serve decoding only."
        ),
        (
            "Clusters are those of the authors' code, average linkage of cosine distances and the first head of each "
            "as its leader, where the paper names K-means; weights are causal, where the code lets the first tokens "
            "see later ones."
        ),
        (
            "The paper reads each layer's number of clusters off a plot of the error; `elbow` takes the point furthest "
            "below the line between the ends of that plot."
        ),
        (
            "A cluster's scores are computed once in a prompt. A decoded token computes them for each head from the "
            "leader's keys, read in place: bytes are saved, products are not. Bytes read count shared keys once: for "
            "the later heads the engine finds them in the processor's caches."
        ),
        "Does not compose with policies that evict or select.",
    ),
    example={"heads": 0.5},
    exact=lambda n: {"heads": 1.0},  # noqa: ARG005  of any length
    ladder=lambda n: tuple({"heads": part} for part in (0.25, 0.5, 0.75, 1.0)),  # noqa: ARG005
    at_budget=lambda b: {"heads": 2 * b.part - 1} if b.part > 0.5 else None,
)
@dataclass(frozen=True)
class Chai(CachePolicy):
    """out_h = softmax(q_l K_l^T scale) V_h with l the leader of h: the first head of its cluster.

    Clusters are formed once for each sequence and layer, by average linkage of 1 - cos(A_g, A_h): A_h are the weights
    with which the first tokens attend to each other in head h.

    Args:
        heads: Part of the key/value heads whose keys are kept, to the nearest number but one at least; see `elbow`.
        warmup: First tokens, which attend as they are.
    """

    heads: float = 0.5
    warmup: int = 5

    reads_prompts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.heads <= 1, "heads", self.heads, "above 0 and at most 1, a part of the key/value heads")
        require(self.warmup >= 2, "warmup", self.warmup, "at least 2 tokens: the first attends to nothing but itself")

    def storage(self) -> Storage:
        """As keys and values come, on pages of their own."""
        return Storage()

    def store(self) -> SharedKeyStore:
        """An empty one."""
        return SharedKeyStore(self, self.storage())

    def settle(self, q: Tensor, store: KVStore, step: Step) -> None:
        """Form clusters from a prompt that did not attend through the store, as where a recipe's is sparse."""
        if isinstance(store, SharedKeyStore):
            form_clusters(q, store, resolve_scale(step.scale, q.shape[3]), step.softcap)

    def leaders(self, weights: Tensor, heads: int) -> Tensor:
        """The first head of each head's cluster, int64 `[n, G]`, from the first tokens' weights `[n, H, W, W]`."""
        count = max(1, int(self.heads * heads + 0.5))
        return next(leader for left, leader in linkages(_features(weights, heads)) if left == count)


def elbow(weights: Tensor, heads: int) -> float:
    """The `heads` that a layer bears: where more clusters no longer lessen the error by much.

        for layer, weights in enumerate(model(ids, output_attentions=True).attentions):
            policies[layer] = Chai(heads=elbow(weights[..., :5, :5], heads=config.num_key_value_heads))

    Args:
        weights: `[S, H, W, W]`, weights with which the first W tokens of S texts attend to each other.
        heads: G, key/value heads.

    Returns:
        A part of the heads: the number of clusters whose error, the squared distance of heads from their cluster's
        mean, is furthest below the line from one cluster's to G clusters'; 1 where heads are all alike.

    Raises:
        ValueError: If the weights are not of such a shape.
    """
    require(weights.ndim == 4, "weights", tuple(weights.shape), "[S, H, W, W]")
    require(heads >= 1 and weights.shape[1] % heads == 0, "heads", heads, f"a divisor of {weights.shape[1]}")
    features = _features(weights, heads)
    errors = torch.zeros(heads, dtype=features.dtype)
    for count, leader in linkages(features):
        mine = (leader[:, None] == torch.arange(heads, device=leader.device)[:, None]).to(features.dtype)
        means = mine @ features / mine.sum(2, keepdim=True).clamp(min=1)
        errors[count - 1] = (features - means.gather(1, leader[..., None].expand_as(features))).square().sum()
    below = errors[0] * torch.linspace(1, 0, heads, dtype=errors.dtype) - errors
    return 1.0 if not bool(below.max() > 0) else (int(below.argmax()) + 1) / heads


def _features(weights: Tensor, heads: int) -> Tensor:
    """What key/value heads are compared by, fp64 `[n, G, share * W * W]`."""
    return weights.double().unflatten(1, (heads, -1)).flatten(2)


def linkages(features: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Clusters by average linkage of cosine distances, one fewer at a time.

    Args:
        features: `[n, G, F]`.

    Yields:
        The number of clusters, from G to 1, and the first head of each head's cluster, int64 `[n, G]`.
    """
    samples, heads, _ = features.shape
    unit = torch.nn.functional.normalize(features, dim=-1)
    apart = 1 - unit @ unit.mT
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    sizes = apart.new_ones(samples, heads)
    leader, each = (
        torch.arange(heads, device=apart.device).repeat(samples, 1),
        torch.arange(samples, device=apart.device),
    )
    yield heads, leader
    for left in range(heads - 1, 0, -1):
        pair = apart.flatten(1).argmin(1)
        first, second = torch.minimum(pair // heads, pair % heads), torch.maximum(pair // heads, pair % heads)
        counts = sizes[each, first, None], sizes[each, second, None]
        joint = (apart[each, first] * counts[0] + apart[each, second] * counts[1]) / (counts[0] + counts[1])
        apart[each, first], apart[each, :, first] = joint, joint
        apart[each, second], apart[each, :, second] = torch.inf, torch.inf
        sizes[each, first] += counts[1][:, 0]
        leader = torch.where(leader == second[:, None], first[:, None], leader)
        yield left, leader


__all__ = ["Chai", "elbow", "linkages"]
