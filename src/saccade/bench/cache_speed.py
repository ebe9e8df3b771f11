"""`saccade bench decode`: a decoded token through one layer of an 8B model, transformers' cache beside Saccade's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.bench.cache_rows import candidates
from saccade.bench.measure import interleaved, median, quartiles
from saccade.mechanisms.cache.base import CachePolicy, Everything, Step, compose, decode_step
from saccade.mechanisms.cache.h2o import H2O
from saccade.mechanisms.cache.sink_recent import SinkRecent
from saccade.mechanisms.cache.storage import Storage

HEADS, KV_HEADS, DIM, MLP = 32, 8, 128, 14_336
"""Query heads, key/value heads, channels of a head, and width of the MLP: Llama 3.1 8B."""

LAST = 32
"""Tokens of the prompt whose queries are made up: policies that look at attention see that of these."""

LENGTHS = (8192, 32_768, 131_072)
"""Tokens in the cache."""

COLUMNS = ("tokens", "cache", "bytes freed", "attention", "25 to 75 %", "speed-up", "whole layer", "speed-up")

DENSE = "transformers: DynamicCache, SDPA"


def composed(tokens: int) -> dict[str, CachePolicy]:
    """Policies of several axes, at this many tokens."""
    quarter = max(tokens // 4, 8)
    heavy = H2O(heavy=quarter // 2, recent=quarter // 2)
    return {
        "everything, as it comes": Everything(),
        "everything, 8 bits": compose(store=Storage(bits=8)),
        "everything, 4 bits": compose(store=Storage(bits=4, group=32)),
        "h2o 25 %, as it comes": heavy,
        "h2o 25 %, 8 bits": compose(keep=heavy, store=Storage(bits=8)),
        "sink_recent 25 %, 8 bits": compose(keep=SinkRecent(4, quarter - 4), store=Storage(bits=8)),
    }


@dataclass(frozen=True)
class DecodeRow:
    """A cache at one length.

    Args:
        tokens: In the cache.
        name: Of the cache.
        nbytes: Of keys and values held.
        freed: Part of `DynamicCache`'s bytes that is not held.
        attention: Seconds of a step of the attention sub-layer: projections, cache and attention.
        spread: Its quartiles.
        layer: Seconds of a step of the whole layer, with its MLP.
        attention_speedup: Of `DynamicCache` and SDPA over this, same rounds.
        layer_speedup: Likewise, of the whole layer.
    """

    tokens: int
    name: str
    nbytes: int
    freed: float
    attention: float
    spread: tuple[float, float]
    layer: float
    attention_speedup: float
    layer_speedup: float

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """A row of the table."""
        low, high = self.spread
        return [(
            f"{self.tokens:,}", self.name, f"{self.freed:.0%}", f"{self.attention * 1e3:.2f} ms",
            f"{low * 1e3:.2f} to {high * 1e3:.2f}", f"{self.attention_speedup:.2f}", f"{self.layer * 1e3:.2f} ms",
            f"{self.layer_speedup:.2f}",
        )]  # fmt: skip


def bench_decode(
    lengths: Sequence[int] = LENGTHS, *, rounds: int = 15, dtype: torch.dtype = torch.bfloat16,
    registry: bool = False, progress: Callable[[str], object] = str,
) -> list[DecodeRow]:  # fmt: skip
    """Time a decoded token with each cache, in interleaved rounds.

    Args:
        lengths: Tokens in the cache.
        rounds: Counted steps of each cache.
        dtype: Of weights, keys and values.
        registry: Also every registered policy at 25 % of the bytes, as far as its choice can be made on one layer.
        progress: Told what is done next.

    Returns:
        A row per length and cache.

    Raises:
        ValueError: If a number is out of range.
    """
    if rounds < 1 or any(tokens < 2 * LAST for tokens in lengths):
        raise ValueError(f"rounds={rounds}, lengths={tuple(lengths)}: expected at least 1, and {2 * LAST} tokens")
    found: list[DecodeRow] = []
    for tokens in lengths:
        policies = composed(tokens)
        if registry:
            more, _ = candidates(tokens, 1, (0.25,))
            policies |= {f"{one.name} at 25 %": one.policy for one in more}
        progress(f"{tokens:,} tokens: attention")
        small, held = _steps(policies, tokens, rounds, dtype, mlp=DIM)
        progress(f"{tokens:,} tokens: whole layer")
        large, _ = _steps(policies, tokens, rounds, dtype, mlp=MLP)
        for name, seconds in small.items():
            attention, layer = median(seconds), median(large[name])
            found.append(DecodeRow(
                tokens, name, held[name], 1 - held[name] / held[DENSE], attention, quartiles(seconds), layer,
                median(small[DENSE]) / attention, median(large[DENSE]) / layer,
            ))  # fmt: skip
    return found


@torch.no_grad()
def _steps(
    policies: Mapping[str, CachePolicy], tokens: int, rounds: int, dtype: torch.dtype, *, mlp: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every counted step of a layer with each cache, and the bytes that each holds."""
    from saccade.plug.cache import cache_bytes

    token = torch.ones(1, 1, dtype=torch.int64)
    q, k, v = _past(tokens, dtype)
    with one_layer(mlp, dtype) as (plain, applied):
        caches: dict[str, tuple[Any, Any]] = {DENSE: (plain, _dynamic(k, v))}
        caches |= {name: (applied, _paged(applied, policy, q, k, v)) for name, policy in policies.items()}
        calls = {
            name: (lambda model=model, cache=cache: model(input_ids=token, past_key_values=cache))
            for name, (model, cache) in caches.items()
        }
        held = {name: cache_bytes(cache) for name, (_, cache) in caches.items()}
        return interleaved(calls, rounds, warmup=2), held


@contextmanager
def one_layer(mlp: int, dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """A model of one layer of Llama 3.1 8B's shapes and random weights, as it is and with Saccade's attention.

    Args:
        mlp: Width of its MLP.
        dtype: Of its weights.

    Yields:
        Two models that share their weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from saccade.plug import Recipe, apply

    config = LlamaConfig(
        vocab_size=64, hidden_size=HEADS * DIM, intermediate_size=mlp, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=2**20, dtype=dtype,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain, other = (LlamaForCausalLM(deepcopy(config)).to(dtype).eval() for _ in range(2))
    other.load_state_dict(plain.state_dict(), assign=True)
    with apply(other, Recipe.uniform(other, "dense", {"engine": "saccade"})):
        yield plain, other


def _past(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The last queries `[1, H, LAST, D]`, and keys and values `[1, G, N, D]` of a past, random."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, LAST), (KV_HEADS, tokens), (KV_HEADS, tokens))
    q, k, v = (torch.randn(1, *size, DIM, generator=generator).to(dtype) for size in sizes)
    return q, k, v


def _dynamic(k: Tensor, v: Tensor) -> Any:
    """Transformers' cache, filled."""
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(k, v, 0)
    return cache


def _paged(model: Any, policy: CachePolicy, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Saccade's cache, filled and cut as the policy says after the last queries of the prompt."""
    from saccade.plug import PagedCache

    cache = PagedCache(model, policy)
    (layer,) = cache.layers
    before = k.shape[2] - LAST
    layer.store.append(k[:, :, :before], v[:, :, :before])
    decode_step(policy, layer.store, q, k[:, :, before:], v[:, :, before:], step=Step())
    layer.length = k.shape[2]
    return cache


__all__ = ["COLUMNS", "LENGTHS", "DecodeRow", "bench_decode", "composed", "one_layer"]
