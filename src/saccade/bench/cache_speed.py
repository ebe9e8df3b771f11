"""`saccade bench decode`: a decoded token through one layer of an 8B model, transformers' cache beside Saccade's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from saccade.bench.cache_layer import (
    DIM,
    HEADS,
    LAST,
    LAYERS,
    MeanLayer,
    filled_dynamic,
    filled_paged,
    layer_kinds,
    llama_layers,
    random_past,
)  # fmt: skip
from saccade.bench.cache_rows import Candidate, candidates, composed, matching, placed
from saccade.bench.cache_tiers import DEPTH, STEPS, TieredRows, tiered_rows
from saccade.bench.measure import interleaved, median, quartiles

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
    budgets: Sequence[float] = (0.25,), only: str | None = None, disk: str | os.PathLike[str] | None = None,
    progress: Callable[[str], object] = str,
) -> list[DecodeRow]:  # fmt: skip
    """Time a decoded token with each cache, in interleaved rounds.

    Args:
        lengths: Tokens in the cache.
        rounds: Counted steps of each cache.
        dtype: Of weights, keys and values.
        budgets: Of every registered policy. Where its layers differ so that one alone cannot follow the rule, one of
            each kind is timed, and the mean of `LAYERS` layers is told.
        only: Rows in whose label this regular expression is found; None for all.
        disk: Directory that gets files with half of the pages of what is kept whole, for rows of their own; None for no
            such rows. The system is made to forget the files before each call, so that the disk is read.
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
        chosen = matching(_alone_or_together(tokens, budgets) + composed(tokens, 1) + placed(tokens), only)
        progress(f"{tokens:,} tokens")
        steps, held = _steps(chosen, tokens, rounds, dtype, disk)
        mlp = median(steps.pop(""))
        dense = median(steps[DENSE])
        for name in sorted(steps, key=[DENSE, *(one.label for one in chosen), *steps].index):
            seconds = steps[name]
            layer = median(seconds)
            found.append(DecodeRow(
                tokens, name, held[name], 1 - held[name] / held[DENSE], layer, quartiles(seconds), layer - mlp,
                dense / layer, (dense - mlp) / (layer - mlp),
            ))  # fmt: skip
    return found


def _alone_or_together(tokens: int, budgets: Sequence[float]) -> list[Candidate]:
    """Policies at budgets with settings for one layer, or where there are none, for `LAYERS`."""
    alone, together = (candidates(tokens, layers, budgets)[0] for layers in (1, LAYERS))
    known = {one.label for one in alone}
    return sorted(alone + [one for one in together if one.label not in known], key=lambda one: one.name)


@torch.no_grad()
def _steps(
    chosen: Sequence[Candidate], tokens: int, rounds: int, dtype: torch.dtype, disk: str | os.PathLike[str] | None
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every counted step of a layer with each cache, under "" those of its MLP, and bytes held."""
    from saccade.plug.cache import cache_bytes

    token = torch.ones(1, 1, dtype=torch.int64)
    q, k, v = random_past(tokens, dtype)
    with ExitStack() as stack:
        plain, applied = stack.enter_context(llama_layers(1, dtype))
        caches: dict[str, tuple[Any, Any]] = {DENSE: (plain, filled_dynamic(k, v))}
        means: dict[str, MeanLayer] = {}
        models = {1: applied}
        for one in chosen:
            kinds = layer_kinds(one.policy)
            if len(kinds) not in models:
                models[len(kinds)] = stack.enter_context(llama_layers(len(kinds), dtype))[1]
            model, several = models[len(kinds)], len(kinds) > 1
            cache = filled_paged(model, one.policy, q, k, v, numbers=tuple(kinds) if several else ())
            if several:
                means[one.label] = MeanLayer(model, cache, kinds)
            else:
                caches[one.label] = model, cache
        calls: dict[str, Callable[[], Any]] = {
            name: partial(model, input_ids=token, past_key_values=cache) for name, (model, cache) in caches.items()
        }
        calls |= {name: partial(mean, input_ids=token) for name, mean in means.items()}
        hidden = torch.zeros(1, 1, HEADS * DIM, dtype=dtype)
        calls[""] = partial(plain.model.layers[0].mlp, hidden)
        away = TieredRows()
        if disk is not None:
            alike = [one for one in chosen if one.label in caches]
            away = stack.enter_context(tiered_rows(alike, (q, k, v), dtype, disk))
        steps = interleaved(calls | away.calls, rounds, warmup=2, before=away.drop)
        for name in away.calls:
            steps[name] = [seconds / (DEPTH * STEPS) for seconds in steps[name]]
        held = {name: cache_bytes(cache) for name, (_, cache) in caches.items()} | away.nbytes()
        for name, mean in means.items():
            steps[name], held[name] = mean.seconds[-rounds:], mean.nbytes()
        return steps, held


__all__ = ["COLUMNS", "LENGTHS", "DecodeRow", "bench_decode"]
