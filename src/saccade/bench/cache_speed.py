"""`saccade bench decode`: a decoded token through one layer of an 8B model, transformers' cache beside Saccade's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.bench.cache_rows import candidates, composed, matching, placed
from saccade.bench.measure import interleaved, median, quartiles
from saccade.mechanisms.cache.base import CachePolicy, Composed, Step, decode_step

HEADS, KV_HEADS, DIM, MLP, LAYERS = 32, 8, 128, 14_336, 32
"""Query heads, key/value heads, channels of a head, width of the MLP, and layers: Llama 3.1 8B."""

LAST = 32
"""Tokens of the prompt whose queries are made up: policies that look at attention see that of these."""

LENGTHS = (8192, 32_768, 131_072)
"""Tokens in the cache."""

COLUMNS = ("tokens", "cache", "bytes freed", "layer", "25 to 75 %", "tokens/s", "speed-up", "attention", "speed-up")

DENSE = "transformers: DynamicCache, SDPA"


@dataclass(frozen=True)
class DecodeRow:
    """A cache at one length.

    Args:
        tokens: In the cache.
        name: Of the cache, with its budget.
        nbytes: Of keys and values held in this process.
        freed: Part of `DynamicCache`'s bytes that is not held.
        layer: Seconds of a step of the whole layer, median.
        spread: Its quartiles.
        attention: The same less the MLP's, timed in the same rounds: projections, cache and attention.
        layer_speedup: Of `DynamicCache` and SDPA over this, same rounds.
        attention_speedup: Likewise, without the MLP.
    """

    tokens: int
    name: str
    nbytes: int
    freed: float
    layer: float
    spread: tuple[float, float]
    attention: float
    layer_speedup: float
    attention_speedup: float

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """A row of the table; tokens a second are those of a model of `LAYERS` such layers and nothing else."""
        low, high = self.spread
        return [(
            f"{self.tokens:,}", self.name, f"{self.freed:.0%}", f"{self.layer * 1e3:.1f} ms",
            f"{low * 1e3:.1f} to {high * 1e3:.1f}", f"{1 / (LAYERS * self.layer):.2f}", f"{self.layer_speedup:.2f}",
            f"{self.attention * 1e3:.1f} ms", f"{self.attention_speedup:.2f}",
        )]  # fmt: skip


def bench_decode(
    lengths: Sequence[int] = LENGTHS, *, rounds: int = 7, dtype: torch.dtype = torch.bfloat16,
    budgets: Sequence[float] = (0.25,), only: str | None = None, progress: Callable[[str], object] = str,
) -> list[DecodeRow]:  # fmt: skip
    """Time a decoded token with each cache, in interleaved rounds.

    Args:
        lengths: Tokens in the cache.
        rounds: Counted steps of each cache.
        dtype: Of weights, keys and values.
        budgets: Of every registered policy whose choice can be made on one layer.
        only: Rows in whose label this regular expression is found; None for all.
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
        chosen, _ = candidates(tokens, 1, budgets)
        chosen = matching(chosen + composed(tokens, 1) + placed(tokens), only)
        progress(f"{tokens:,} tokens")
        steps, held = _steps({one.label: one.policy for one in chosen}, tokens, rounds, dtype)
        mlp = median(steps.pop(""))
        dense = median(steps[DENSE])
        for name, seconds in steps.items():
            layer = median(seconds)
            found.append(DecodeRow(
                tokens, name, held[name], 1 - held[name] / held[DENSE], layer, quartiles(seconds), layer - mlp,
                dense / layer, (dense - mlp) / (layer - mlp),
            ))  # fmt: skip
    return found


@torch.no_grad()
def _steps(
    policies: Mapping[str, CachePolicy], tokens: int, rounds: int, dtype: torch.dtype
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every counted step of a layer with each cache, under "" those of its MLP, and bytes held."""
    from saccade.plug.cache import cache_bytes

    token = torch.ones(1, 1, dtype=torch.int64)
    q, k, v = _past(tokens, dtype)
    with one_layer(MLP, dtype) as (plain, applied):
        caches: dict[str, tuple[Any, Any]] = {DENSE: (plain, _dynamic(k, v))}
        caches |= {name: (applied, _paged(applied, policy, q, k, v)) for name, policy in policies.items()}
        calls: dict[str, Callable[[], Any]] = {
            name: partial(model, input_ids=token, past_key_values=cache) for name, (model, cache) in caches.items()
        }
        hidden = torch.zeros(1, 1, HEADS * DIM, dtype=dtype)
        calls[""] = partial(plain.model.layers[0].mlp, hidden)
        steps = interleaved(calls, rounds, warmup=2)
        return steps, {name: cache_bytes(cache) for name, (_, cache) in caches.items()}


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

    policy = _of_prompt(policy, k.shape[2])
    cache = PagedCache(model, policy)
    (layer,) = cache.layers
    before = k.shape[2] - LAST
    layer.store.append(k[:, :, :before], v[:, :, :before])
    decode_step(policy, layer.store, q, k[:, :, before:], v[:, :, before:], step=Step())
    layer.length = k.shape[2]
    return cache


def _of_prompt(policy: CachePolicy, tokens: int) -> CachePolicy:
    """The policy, told how long the prompt is where it asks: only the last `LAST` tokens come in a call."""
    if isinstance(policy, Composed):
        return replace(policy, keeper=_of_prompt(policy.keeper, tokens))
    fields: Any = policy
    return replace(fields, prompt=tokens) if hasattr(policy, "prompt") else policy


__all__ = ["COLUMNS", "LENGTHS", "DecodeRow", "bench_decode", "one_layer"]
