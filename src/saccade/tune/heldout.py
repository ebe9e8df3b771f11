"""Measuring a recipe against the dense model on text that tuning has not seen, in interleaved runs."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.bench.measure import peak_bytes, synchronise
from saccade.models.passkey import Passkey, passkey_results
from saccade.models.tasks import pair_score
from saccade.plug import LayerCache, Recipe, apply, explain
from saccade.tune.cache_read import read_tail, tail_answers, tail_nll
from saccade.tune.cache_score import tail_length

ARMS = ("dense", "tuned")
DECODE_TOKENS = 32
"""Steps timed in each round; the median counts."""


@dataclass(frozen=True)
class TimeSplit:
    """Where the time of one prefill goes, in seconds, and its peak memory in bytes (None: cannot be measured)."""

    kernel: float
    select: float
    rest: float
    peak_bytes: int | None


class Runner:
    """Runs one model as its two arms: as it is, and with a recipe.

    Args:
        model: A transformers causal language model.
        recipe: The recipe of the tuned arm.

    Attributes:
        cuts: Whether its caches hold less than everything as it comes.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.cuts = any(layer.cache not in (None, LayerCache()) for layer in recipe.layers.values())
        self.device = str(model.device)

    def arm(self, name: str) -> AbstractContextManager[Any]:
        """Inside, the model is that arm."""
        return apply(self.model, self.recipe) if name == "tuned" else nullcontext()

    def make_cache(self, name: str) -> Any:
        """An empty cache as that arm's user would have it, inside of `arm`; None lets transformers make its own."""
        return self.recipe.make_cache(self.model) if name == "tuned" and self.recipe.has_cache else None

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any, float]:
        """Hidden states `[N, C]`, the filled cache, and the seconds it took, for ids `[1, N]` and an empty cache."""
        body = getattr(self.model, self.model.base_model_prefix)
        synchronise(self.device)
        started = time.perf_counter()
        out = body(input_ids=ids.to(self.device), past_key_values=cache, use_cache=True)
        synchronise(self.device)
        return out.last_hidden_state[0], out.past_key_values, time.perf_counter() - started

    @torch.no_grad()
    def decode(self, cache: Any, token: Tensor) -> list[float]:
        """Seconds of each of `DECODE_TOKENS` greedy steps on a warm cache, from a first token `[1, 1]`."""
        seconds = []
        for _ in range(DECODE_TOKENS):
            synchronise(self.device)
            started = time.perf_counter()
            out = self.model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            synchronise(self.device)
            seconds.append(time.perf_counter() - started)
        return seconds

    def split(self, ids: Tensor, name: str) -> TimeSplit:
        """The parts of one prefill; the dense arm runs through an all-dense recipe, which times its layers."""
        recipe = self.recipe if name == "tuned" else Recipe.uniform(self.model, "dense")
        seconds: list[float] = []
        with apply(self.model, recipe):
            peak = peak_bytes(lambda: seconds.append(self.prefill(ids, self.make_cache(name))[2]), self.device)
            rows = [row for row in explain(self.model).rows if row.phase == "prefill" and row.ran]
        attention = sum({row.layer: row.seconds for row in rows}.values())
        select = sum(row.select_seconds for row in rows)
        return TimeSplit(attention - select, select, seconds[0] - attention, peak)


def measure_window(runner: Runner, window: Tensor, number: int) -> dict[str, Any]:
    """Both arms on one held-out window `[N]`, in an order that alternates: times, likelihood, divergence."""
    from saccade.plug.cache import cache_bytes, cache_in_words

    ids = window[None]
    row: dict[str, Any] = {"tokens": window.numel()}
    hidden: dict[str, Tensor] = {}
    for name in ARMS if number % 2 == 0 else ARMS[::-1]:
        with runner.arm(name):
            hidden[name], cache, seconds = runner.prefill(ids, runner.make_cache(name))
            decode = runner.decode(cache, ids[:, -1:].to(runner.device))
        row[name] = {
            "prefill": seconds, "decode": decode, "kv_bytes": cache_bytes(cache), "cache": cache_in_words(cache),
        }  # fmt: skip
        del cache
    if runner.cuts:
        row["tail"] = {name: measure_tail(runner, window, name) for name in ARMS}
    score = pair_score(runner.model, hidden["dense"], hidden["tuned"], window)
    row["dense"]["nll"], row["tuned"]["nll"], row["kl"] = score
    return row


def measure_tail(runner: Runner, window: Tensor, name: str) -> dict[str, Any]:
    """The end of a window `[N]`, read over what one arm's cache kept of the beginning: likelihood and bytes held."""
    from saccade.plug.cache import cache_bytes

    tail = tail_length(window.numel())
    with runner.arm(name):
        hidden, cache = read_tail(runner.model, window.to(runner.device), tail, runner.make_cache(name))
    nll = tail_nll(runner.model, hidden, window[-tail:])
    return {"tokens": tail, "nll": nll, "kv_bytes": cache_bytes(cache)}


def measure_later(runner: Runner, tokenizer: Any, prompts: list[Passkey], name: str) -> list[bool]:
    """Whether one arm finds each pass key when the question comes after its cache was cut."""
    with runner.arm(name):
        answers = tail_answers(runner.model, tokenizer, prompts, lambda: runner.make_cache(name))
    return [answer.found for answer in answers]


def measure_passkeys(runner: Runner, tokenizer: Any, prompts: list[Passkey], name: str) -> list[bool]:
    """Whether one arm finds each pass key."""
    with runner.arm(name):
        results = passkey_results(runner.model, tokenizer, prompts, make_cache=lambda: runner.make_cache(name))
    return [result.found for result in results]
