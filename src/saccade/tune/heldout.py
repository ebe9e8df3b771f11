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
from saccade.plug import Recipe, apply, explain

ARMS = ("dense", "tuned")
DECODE_TOKENS = 8


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
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.device = str(model.device)

    def arm(self, name: str) -> AbstractContextManager[Any]:
        """Inside, the model is that arm."""
        return apply(self.model, self.recipe) if name == "tuned" else nullcontext()

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> tuple[Tensor, Any, float]:
        """Hidden states `[N, C]`, the cache, and the seconds it took, for ids `[1, N]`."""
        body = getattr(self.model, self.model.base_model_prefix)
        synchronise(self.device)
        started = time.perf_counter()
        out = body(input_ids=ids.to(self.device), use_cache=True)
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
            peak = peak_bytes(lambda: seconds.append(self.prefill(ids)[2]), self.device)
            rows = [row for row in explain(self.model).rows if row.phase == "prefill" and row.ran]
        attention = sum({row.layer: row.seconds for row in rows}.values())
        select = sum(row.select_seconds for row in rows)
        return TimeSplit(attention - select, select, seconds[0] - attention, peak)


def measure_window(runner: Runner, window: Tensor, number: int) -> dict[str, Any]:
    """Both arms on one held-out window `[N]`, in an order that alternates: times, likelihood, divergence."""
    ids = window[None]
    row: dict[str, Any] = {"tokens": window.numel()}
    hidden: dict[str, Tensor] = {}
    for name in ARMS if number % 2 == 0 else ARMS[::-1]:
        with runner.arm(name):
            hidden[name], cache, seconds = runner.prefill(ids)
            decode = runner.decode(cache, ids[:, -1:].to(runner.device))
        row[name] = {"prefill": seconds, "decode": decode, "kv_bytes": cache_bytes(cache)}
        del cache
    score = pair_score(runner.model, hidden["dense"], hidden["tuned"], window)
    row["dense"]["nll"], row["tuned"]["nll"], row["kl"] = score
    return row


def cache_bytes(cache: Any) -> int | None:
    """Bytes of keys and values in a transformers cache, or None if it is of an unknown form."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def measure_passkeys(runner: Runner, tokenizer: Any, prompts: list[Passkey], name: str) -> list[bool]:
    """Whether one arm finds each pass key."""
    with runner.arm(name):
        return [result.found for result in passkey_results(runner.model, tokenizer, prompts)]
