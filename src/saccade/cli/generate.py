"""Generating text on the terminal, streaming."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console

from saccade.plug import Recipe, apply, explain

console = Console()


def generate(model: Any, tokenizer: Any, text: str, recipe: Recipe | None, tokens: int, *, explain_after: bool) -> None:
    """Greedy generation of an answer to `text`, printed as it comes, then the speeds."""
    from transformers import DynamicCache, TextStreamer

    from saccade.plug.cache import cache_bytes, cache_in_words

    ids = _prompt(tokenizer, text).to(model.device)
    with torch.no_grad(), apply(model, recipe) if recipe is not None else nullcontext():
        cache = recipe.make_cache(model) if recipe is not None and recipe.has_cache else DynamicCache()
        clock = _Clock(tokenizer, TextStreamer)
        started = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, streamer=clock,
            past_key_values=cache, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        finished = time.perf_counter()
        report = str(explain(model)) if explain_after else ""
    made = out.shape[1] - ids.shape[1]
    first = clock.first - started
    rate = (made - 1) / (finished - clock.first) if made > 1 else 0.0
    console.print(
        f"\n{ids.shape[1]:,} prompt tokens in {first:.2f} s ({ids.shape[1] / first:,.0f} tokens/s), "
        f"{made} generated, {rate:.1f} tokens/s{' with the recipe' if recipe is not None else ', dense'}, "
        f"{cache_bytes(cache) / 1e6:,.1f} MB of keys and values in {cache_in_words(cache)}",
        highlight=False,
        soft_wrap=True,
    )
    if report:
        print(report)


def _prompt(tokenizer: Any, text: str) -> torch.Tensor:
    """The text as a chat turn where the tokenizer has a template, else as it is."""
    if tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids: torch.Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids
    plain: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
    return plain


class _Clock:
    """A streamer that prints words as they are finished and notes when the first token came."""

    def __init__(self, tokenizer: Any, streamer: Any) -> None:
        self.inner = streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first = 0.0
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each token."""
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()
        self.inner.put(value)

    def end(self) -> None:
        """Flush."""
        self.inner.end()
