"""Layers of an 8B model's shapes with random weights, and caches filled with a random past."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from saccade.mechanisms.cache.base import CachePolicy, Composed, Step, decode_step
from saccade.mechanisms.cache.tiers import Tier

HEADS, KV_HEADS, DIM, MLP, LAYERS = 32, 8, 128, 14_336, 32
"""Query heads, key/value heads, channels of a head, width of the MLP, and layers: Llama 3.1 8B."""

LAST = 32
"""Tokens of the prompt whose queries are made up: policies that look at attention see that of these."""


@contextmanager
def llama_layers(count: int, dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """A model of some layers of Llama 3.1 8B's shapes and random weights, as it is and with Saccade's attention.

    Args:
        count: How many layers.
        dtype: Of its weights.

    Yields:
        Two models that share their weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from saccade.plug import Recipe, apply

    config = LlamaConfig(
        vocab_size=64, hidden_size=HEADS * DIM, intermediate_size=MLP, num_hidden_layers=count,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=2**20,
        dtype=dtype,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = LlamaForCausalLM(config).to(dtype).eval()
    other = deepcopy(plain, {id(x): x for x in (*plain.parameters(), *plain.buffers())})
    with apply(other, Recipe.uniform(other, "dense", {"engine": "saccade"})):
        yield plain, other


def random_past(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The last queries `[1, H, LAST, D]`, and keys and values `[1, G, N, D]` of a past."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, LAST), (KV_HEADS, tokens), (KV_HEADS, tokens))
    q, k, v = (torch.randn(1, *size, DIM, generator=generator).to(dtype) for size in sizes)
    return q, k, v


def filled_dynamic(k: Tensor, v: Tensor) -> Any:
    """Transformers' cache of one layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(k, v, 0)
    return cache


def layer_kinds(policy: CachePolicy) -> dict[int, int]:
    """The layers of `LAYERS` that a policy treats each in a way of its own, and how many there are of each kind."""
    return dict(sorted(Counter(map(policy.first_alike, range(LAYERS))).items()))


class MeanLayer:
    """Decodes tokens through one layer of each kind, and tells what the mean of `LAYERS` layers takes.

    Args:
        model: With as many layers as there are kinds.
        cache: Of these layers.
        kinds: See `layer_kinds`.

    Attributes:
        seconds: Of every call so far: those of a layer of each kind, weighted by how many there are of it, and of what
            a model of one layer does beside the layer.
    """

    def __init__(self, model: Any, cache: Any, kinds: Mapping[int, int]) -> None:
        self.model, self.cache, self.kinds = model, cache, kinds
        self.seconds: list[float] = []
        self._stamps: list[float] = []

    def __call__(self, **inputs: Any) -> Any:
        """A decoded token."""
        self._stamps.clear()
        hooks = [
            hook
            for layer in self.model.model.layers
            for hook in (layer.register_forward_pre_hook(self._stamp), layer.register_forward_hook(self._stamp))
        ]
        started = perf_counter()
        out = self.model(past_key_values=self.cache, **inputs)
        whole = perf_counter() - started
        for hook in hooks:
            hook.remove()
        layers = [stop - start for start, stop in zip(self._stamps[::2], self._stamps[1::2], strict=True)]
        self.seconds.append(whole - sum(layers) + self.mean(layers))
        return out

    def mean(self, numbers: Sequence[float]) -> float:
        """Of a number for each kind, over all `LAYERS` layers."""
        return sum(count * x for count, x in zip(self.kinds.values(), numbers, strict=True)) / LAYERS

    def nbytes(self) -> int:
        """Bytes that the mean layer holds."""
        return round(self.mean([layer.store.nbytes for layer in self.cache.layers]))

    def _stamp(self, *_: Any) -> None:
        self._stamps.append(perf_counter())


def filled_paged(
    model: Any, policy: CachePolicy, q: Tensor, k: Tensor, v: Tensor, tier: Tier | None = None,
    numbers: Sequence[int] = (),
) -> Any:  # fmt: skip
    """Saccade's cache, each layer filled with the same and cut as the policy says after the last queries of the prompt.

    Args:
        model: With a recipe applied.
        policy: Of all layers.
        q: The last queries `[1, H, LAST, D]`.
        k: `[1, G, N, D]`.
        v: `[1, G, N, E]`.
        tier: Where pages live that are not read; None for memory.
        numbers: Which of `LAYERS` layers the model's are; empty for its own.

    Returns:
        A `PagedCache`.
    """
    from saccade.plug import PagedCache

    policy = _of_prompt(policy, k.shape[2])
    cache = PagedCache(model, policy, tier)
    before = k.shape[2] - LAST
    if numbers:
        cache.step.layers = LAYERS
        for layer, number in zip(cache.layers, numbers, strict=True):
            layer.number = number
    for layer in cache.layers:
        layer.store.append(k[:, :, :before], v[:, :, :before])
        step = Step(layer=layer.number, layers=cache.step.layers)
        decode_step(policy, layer.store, q, k[:, :, before:], v[:, :, before:], step=step)
        layer.length = k.shape[2]
    return cache


def _of_prompt(policy: CachePolicy, tokens: int) -> CachePolicy:
    """The policy, told how long the prompt is where it asks: only the last `LAST` tokens come in a call."""
    if isinstance(policy, Composed):
        return replace(policy, keeper=_of_prompt(policy.keeper, tokens))
    fields: Any = policy
    return replace(fields, prompt=tokens) if hasattr(policy, "prompt") else policy


__all__ = [
    "DIM", "HEADS", "KV_HEADS", "LAST", "LAYERS", "MLP", "MeanLayer", "filled_dynamic", "filled_paged", "layer_kinds",
    "llama_layers", "random_past",
]  # fmt: skip
