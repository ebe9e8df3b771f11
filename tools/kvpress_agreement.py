"""Which tokens kvpress's presses and our policies keep of the same prompts, and what the model then recalls.

`pip install --no-deps kvpress==0.5.5` and what it imports, then `python tools/kvpress_agreement.py` prints the table of
docs/cache.md. A press compresses the cache of a dense prefill by its own code; a policy that of a prefill by ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)  # fmt: skip
from torch import Tensor

from saccade import catalog
from saccade.mechanisms.cache.base import Everything
from saccade.models.ruler import recall_tasks
from saccade.models.smollm2 import load_smollm2
from saccade.models.text import heldout_text
from saccade.plug import PagedCache, Recipe, apply

TOKENS, TEXT = 600, 32
"""Of a prompt with its answer; of the text, as many are continued."""
KEPT = (0.25, 0.5)
POOLED = {"window": 32, "kernel": 5, "pooling": "mean"}


@dataclass(frozen=True)
class Pair:
    """A policy and the press of the same paper.

    Args:
        name: Of the policy.
        policy: Of the number of tokens kept, and of the model's rotary base.
        press: Of the part removed.
    """

    name: str
    policy: Callable[[int, float], Any]
    press: Callable[[float], Any]


def made(name: str, **settings: Any) -> Any:
    """A policy."""
    return catalog.get(name).build(**settings)


PAIRS = (
    Pair("keydiff", lambda n, _: made("keydiff", tokens=n), KeyDiffPress),
    Pair("expected_attention", lambda n, base: made("expected_attention", tokens=n, rope=base), ExpectedAttentionPress),
    Pair("key_norm", lambda n, _: made("key_norm", tokens=n, whole_layers=0), KnormPress),
    Pair("tova", lambda n, _: made("tova", tokens=n), TOVAPress),
    Pair("snapkv", lambda n, _: made("snapkv", tokens=n, **POOLED), lambda part: SnapKVPress(part, 32, 5)),
    Pair("sink_recent", lambda n, _: made("sink_recent", sinks=4, recent=n - 4), StreamingLLMPress),
    Pair("adakv", lambda n, _: made("adakv", tokens=n, **POOLED), lambda part: AdaKVPress(SnapKVPress(part, 32, 5))),
    Pair("pyramidkv", lambda n, _: made("pyramidkv", tokens=n, **POOLED), lambda part: PyramidKVPress(part, 32, 5)),
)


@dataclass(frozen=True)
class Kept:
    """What is left of a prompt.

    Args:
        tokens: Of each layer bool `[G, n]`.
        log_prob: Of what follows, mean in nats a token.
    """

    tokens: list[Tensor]
    log_prob: float


def prompts(tokenizer: Any) -> list[tuple[Tensor, Tensor, int]]:
    """Context `[1, n]`, what follows `[1, m]`, and how many of its last tokens count."""
    tasks = recall_tasks(tokenizer, TOKENS, 2, names=("passkey",)) + recall_tasks(
        tokenizer, TOKENS, 1, names=("multikey", "variables")
    )
    found = [(one.context, torch.cat([one.question, one.answer], 1), one.answer.shape[1]) for one in tasks]
    ids = torch.tensor([tokenizer(heldout_text(), add_special_tokens=False).input_ids[:TOKENS]])
    return [*found, (ids[:, :-TEXT], ids[:, -TEXT:], TEXT)]


def log_prob(logits: Tensor, rest: Tensor, count: int) -> float:
    """Of the last `count` tokens of `rest`."""
    rows = logits[:, :-1].log_softmax(-1).gather(2, rest[:, 1:, None])
    return float(rows[:, -min(count, rest.shape[1] - 1) :].double().mean())


@torch.no_grad()
def theirs(model: Any, press: Any, context: Tensor, rest: Tensor, count: int) -> Kept:
    """A press's."""
    from transformers import DynamicCache

    whole, cut = DynamicCache(), DynamicCache()
    places = torch.arange(context.shape[1])
    model(context, past_key_values=whole)
    with press(model), told_where(model, places):
        model(context, past_key_values=cut)
    tokens = []
    for layer, full, part in zip(model.model.layers, whole.layers, cut.layers, strict=True):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        rows, left = (fingerprints(x.keys[0]) for x in (full, part))
        kept = torch.stack([torch.isin(a, b) for a, b in zip(rows, left, strict=True)])
        if masked is not None:  # a press that only masks keeps every key in the cache
            kept[masked[1], masked[2]] = False
        tokens.append(kept)
    logits = []  # token by token: masks for several would be those of the first layer, and PyramidKV's layers differ
    for number, token in enumerate(rest.split(1, 1), context.shape[1]):
        logits.append(model(token, past_key_values=cut, position_ids=torch.tensor([[number]])).logits)
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return Kept(tokens, log_prob(torch.cat(logits, 1), rest, count))


def fingerprints(keys: Tensor) -> Tensor:
    """A number for the bits of each key, int64 `[G, n]` of fp32 `[G, n, D]`."""
    odd = torch.arange(1, keys.shape[-1] + 1) * 0x9E3779B97F4A7C1 * 2 + 1
    return (keys.contiguous().view(torch.int32).long() * odd).sum(-1)


@contextmanager
def told_where(model: Any, places: Tensor) -> Iterator[None]:
    """Attention modules are told `cache_position`, which presses ask for and transformers no longer passes."""
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"cache_position": places}), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def ours(model: Any, policy: Any, context: Tensor, rest: Tensor, count: int) -> Kept:
    """A policy's; what follows the prompt evicts nothing, as with a press."""
    cache = PagedCache(model, policy)
    model(context, past_key_values=cache)
    tokens = []
    for layer in cache.layers:
        places = layer.store.positions[0].masked_fill(~layer.store.present[0], context.shape[1])
        kept = torch.zeros(len(places), context.shape[1] + 1, dtype=torch.bool)
        tokens.append(kept.scatter_(1, places, value=True)[:, :-1])
        layer.policy = Everything()
    logits = model(rest, past_key_values=cache).logits
    return Kept(tokens, log_prob(logits, rest, count))


def main() -> None:
    """Print the table."""
    model, tokenizer = load_smollm2()
    base = model.config.rope_parameters["rope_theta"]
    other, _ = load_smollm2()
    material = prompts(tokenizer)
    print("| policy | press |", *(f"{part:.0%} kept: equal heads | equal tokens | theirs | ours |" for part in KEPT))
    print("|---|---" + "|---:" * 4 * len(KEPT) + "|")
    with apply(other, Recipe.uniform(other, "dense", {"engine": "saccade"})):
        for pair in PAIRS:
            cells = []
            for part in KEPT:
                press = pair.press(1 - part)
                results = [
                    (
                        theirs(model, press, *one),
                        ours(other, pair.policy(int(one[0].shape[1] * part), base), *one),
                    )
                    for one in material
                ]
                cells += compared(results)
            press = type(pair.press(0.5)).__name__.removesuffix("Press")
            print(f"| `{pair.name}` | {press} |", *(f"{cell} |" for cell in cells), flush=True)


def compared(results: list[tuple[Kept, Kept]]) -> list[str]:
    """Equal heads, equal tokens of the larger set, and recall: without the last prompt, which is text."""
    equal, shared = [], []
    for one, another in results:
        for a, b in zip(one.tokens, another.tokens, strict=True):
            equal.append((a == b).all(-1))
            shared.append((a & b).sum(-1) / torch.maximum(a.sum(-1), b.sum(-1)))
    recall = [sum(both[side].log_prob for both in results[:-1]) / (len(results) - 1) for side in (0, 1)]
    heads, tokens = torch.cat(equal).float().mean(), torch.cat(shared).mean()
    return [f"{heads:.1%}", f"{tokens:.3%}", *(f"{nats:.3f}" for nats in recall)]


if __name__ == "__main__":
    main()
