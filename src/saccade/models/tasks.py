"""What a language model can still do: perplexity and divergence on text, and finding a pass key in a long one.

Perplexity and divergence work on the last hidden states `[N, C]` of a run, not its logits: for 8,192 tokens and 49,152
words these are 19 MB instead of 1.6 GB, and logits are made from them a slice at a time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.models.text import heldout_text

SLICE = 512
"""Tokens whose logits are held at a time."""


@dataclass(frozen=True)
class LanguageScore:
    """How well a model predicts some text.

    Args:
        nll: Mean negative log-likelihood of the next token, in nats.
        tokens: Predicted tokens.
        kl: Mean over tokens of KL(reference || model), in nats; None without a reference.
    """

    nll: float
    tokens: int
    kl: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


@dataclass(frozen=True, eq=False)
class Passkey:
    """A chat prompt with a number hidden in a long text.

    Args:
        ids: int64 `[1, n]`, the prompt up to where the answer begins.
        answer: The number, as digits.
        length: Tokens asked for; n is at most this and a few less.
        depth: Place of the number in the text: 0 at its beginning, 1 at its end.
    """

    ids: Tensor
    answer: str
    length: int
    depth: float


@dataclass(frozen=True)
class PasskeyResult:
    """What a model answered to a `Passkey`: `found` is whether the number is in `reply`."""

    length: int
    depth: float
    answer: str
    reply: str
    found: bool


def text_windows(ids: Tensor, context: int, count: int | None = None) -> Tensor:
    """Cut token ids `[n]` or `[1, n]` into windows `[W, context]` that do not overlap; at most `count`, evenly spread.

    Args:
        ids: int64 `[n]` or `[1, n]`.
        context: Tokens of a window.
        count: Most windows to take; None means all.

    Returns:
        int64 `[W, context]`.

    Raises:
        ValueError: If the text is shorter than one window, or a number is out of range.
    """
    if context < 2:
        raise ValueError(f"context={context}: expected at least 2 tokens")
    if count is not None and count < 1:
        raise ValueError(f"count={count}: expected at least 1 window")
    flat = ids.reshape(-1)
    total = flat.numel() // context
    if total == 0:
        raise ValueError(f"text of {flat.numel()} tokens: expected at least one window of {context}")
    windows = flat[: total * context].view(total, context)
    if count is None or count >= total:
        return windows
    return windows[torch.linspace(0, total - 1, count).round().long()]


@torch.no_grad()
def last_hidden_states(model: Any, ids: Tensor) -> Tensor:
    """Hidden states `[N, C]` before the output layer, for one window of token ids `[N]` or `[1, N]`."""
    body = getattr(model, model.base_model_prefix)
    hidden: Tensor = body(input_ids=ids.reshape(1, -1).to(model.device), use_cache=False).last_hidden_state
    return hidden[0]


def language_score(
    model: Any, windows: Tensor, reference: Sequence[Tensor] | None = None, keep: list[Tensor] | None = None
) -> LanguageScore:
    """Likelihood of each window of text, and the divergence from an earlier run.

    Args:
        model: A transformers causal language model.
        windows: Token ids `[W, N]`; each window is read on its own.
        reference: For each window the hidden states of another run of the same model, such as without its recipe.
        keep: If given, this run's hidden states are appended to it, on the CPU, to serve as a reference later.

    Returns:
        The score over all windows.

    Raises:
        ValueError: If the reference does not fit, or the model computes logits in a way that is not known here.
    """
    if reference is not None and len(reference) != len(windows):
        raise ValueError(f"reference of {len(reference)} windows: expected {len(windows)}")
    check_head(model)
    loss, divergence = 0.0, 0.0
    for place, window in enumerate(windows):
        hidden = last_hidden_states(model, window)
        loss -= float(token_log_probs(model, hidden, window).double().sum())
        if reference is not None:
            divergence += float(token_kl(model, reference[place], hidden).double().sum())
        if keep is not None:
            keep.append(hidden.cpu())
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    kl = None if reference is None else divergence / windows.numel()
    return LanguageScore(loss / predicted, predicted, kl)


def perplexity(model: Any, ids: Tensor, context: int, count: int | None = None) -> float:
    """Perplexity on token ids `[n]`, read in windows of `context` tokens (at most `count` of them)."""
    return language_score(model, text_windows(ids, context, count)).perplexity


@torch.no_grad()
def token_log_probs(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """Log-probability, fp32 `[N - 1]`, that each token but the first has, from hidden states `[N, C]` and ids `[N]`."""
    targets = ids.reshape(-1)[1:].to(hidden.device)
    slices = zip(hidden[:-1].split(SLICE), targets.split(SLICE), strict=True)
    parts = [log_probs(model, part).gather(1, target[:, None])[:, 0] for part, target in slices]
    return torch.cat(parts)


@torch.no_grad()
def token_kl(model: Any, reference: Tensor, hidden: Tensor) -> Tensor:
    """KL(reference || model) of the predictions after each token, fp32 `[N]` nats, from hidden states `[N, C]` of both.

    Args:
        model: Gives the output layer, the same for both.
        reference: `[N, C]`, of the run to compare with.
        hidden: `[N, C]`, of this run.

    Returns:
        fp32 `[N]`.

    Raises:
        ValueError: If the shapes differ.
    """
    if reference.shape != hidden.shape:
        raise ValueError(f"reference of shape {tuple(reference.shape)}: expected {tuple(hidden.shape)}")
    parts = []
    for theirs, ours in zip(reference.split(SLICE), hidden.split(SLICE), strict=True):
        expected = log_probs(model, theirs.to(ours.device))
        parts.append((expected.exp() * (expected - log_probs(model, ours))).sum(-1))
    return torch.cat(parts)


@torch.no_grad()
def pair_score(model: Any, reference: Tensor, hidden: Tensor, ids: Tensor) -> tuple[float, float, float]:
    """Two runs on one window in a single pass over the output layer.

    Args:
        model: A transformers causal language model.
        reference: Hidden states `[N, C]` of the reference run.
        hidden: Hidden states `[N, C]` of the other.
        ids: Token ids `[N]`.

    Returns:
        Mean negative log-likelihood of the reference and of the other, and the mean KL(reference || other), in nats.

    Raises:
        ValueError: If the shapes differ.
    """
    if reference.shape != hidden.shape:
        raise ValueError(f"reference of shape {tuple(reference.shape)}: expected {tuple(hidden.shape)}")
    # The last token predicts one that is not there: it counts for the divergence only.
    targets = torch.nn.functional.pad(ids.reshape(-1)[1:].to(hidden.device), (0, 1))
    counted = torch.nn.functional.pad(torch.ones(len(targets) - 1, device=hidden.device), (0, 1))
    sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    parts = (tensor.split(SLICE) for tensor in (reference, hidden, targets, counted))
    for theirs, ours, target, weight in zip(*parts, strict=True):
        expected, found = log_probs(model, theirs), log_probs(model, ours)
        nll = [-(table.gather(1, target[:, None])[:, 0] * weight).sum() for table in (expected, found)]
        sums += torch.stack([*nll, (expected.exp() * (expected - found)).sum()]).double()
    first, second, divergence = sums.tolist()
    return first / (len(targets) - 1), second / (len(targets) - 1), divergence / len(targets)


def log_probs(model: Any, hidden: Tensor) -> Tensor:
    """Log-probabilities fp32 `[n, vocabulary]` of the next token, from hidden states `[n, C]`."""
    return logits(model, hidden).float().log_softmax(-1)


def logits(model: Any, hidden: Tensor) -> Tensor:
    """The model's logits from its hidden states, with the scaling and soft-capping that its config names."""
    out: Tensor = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    out = out if factor is None else out * factor
    out = out if divisor is None else out / divisor
    return out if cap is None else cap * torch.tanh(out / cap)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Make sure, on a few tokens, that `logits` is what the model itself computes.

    Args:
        model: A transformers causal language model.

    Raises:
        ValueError: If it is not.
    """
    ids = torch.arange(1, 5, device=model.device)[None]
    expected = model(input_ids=ids, use_cache=False).logits[0]
    found = logits(model, last_hidden_states(model, ids))
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"model of type {type(model).__name__}: its logits are not its output layer's, as expected here"
        )


ASK = "Read the text. A pass key is hidden in it. Remember the pass key.\n\n"
NEEDLE = "\n\nThe pass key is the number {key}. Remember it. The pass key is the number {key}.\n\n"
QUESTION = "\n\nWhat is the pass key?"
REPLY = "The pass key is the number"
"""The reply is begun for the model: SmolLM2 otherwise explains what a pass key is."""


def passkey_prompts(
    tokenizer: Any, lengths: Sequence[int], depths: Sequence[float], seed: int = 0, haystack: str | None = None
) -> list[Passkey]:
    """One prompt for each length and depth, each with a 5-digit number and a piece of text of its own.

    Args:
        tokenizer: A transformers tokenizer; its chat template is used if it has one.
        lengths: Tokens of the whole prompt.
        depths: Places of the number in the text, in [0, 1].
        seed: Same seed, same prompts.
        haystack: Text to hide the number in; None means the held-out built-in text. Repeated if too short.

    Returns:
        The prompts, by length and then depth.

    Raises:
        ValueError: If a length is too short for the question or a depth out of range.
    """
    source = tokenizer(heldout_text() if haystack is None else haystack, add_special_tokens=False).input_ids
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth={depth}: expected a number in [0, 1]")
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    prompts = []
    for length in lengths:
        for depth in depths:
            key, start = str(generator.randint(10000, 99999)), generator.randrange(len(source))
            prompts.append(_passkey(tokenizer, source, start, key, length, depth))
    return prompts


def _passkey(tokenizer: Any, source: list[int], start: int, key: str, length: int, depth: float) -> Passkey:
    """Fill the prompt with text until it has the asked length; text may tokenise differently once cut, so shrink."""
    room = length - len(_prompt_ids(tokenizer, "", "", key))
    while room >= 8:
        looped = (source * (1 + (start + room) // len(source)))[start : start + room]
        cut = round(depth * room)
        ids = _prompt_ids(tokenizer, tokenizer.decode(looped[:cut]), tokenizer.decode(looped[cut:]), key)
        if len(ids) <= length:
            return Passkey(torch.tensor([ids]), key, length, depth)
        room -= len(ids) - length
    raise ValueError(f"length={length}: too short for the question and some text around the pass key")


def _prompt_ids(tokenizer: Any, before: str, after: str, key: str) -> list[int]:
    content = ASK + before + NEEDLE.format(key=key) + after + QUESTION
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": content}]
        content = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(content + REPLY, add_special_tokens=False).input_ids
    return tokenizer(content + "\n\n" + REPLY).input_ids


@torch.no_grad()
def passkey_results(model: Any, tokenizer: Any, prompts: Sequence[Passkey], new_tokens: int = 8) -> list[PasskeyResult]:
    """The model's greedy answer to each prompt, one prompt at a time."""
    results = []
    for prompt in prompts:
        ids = prompt.ids.to(model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        reply = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        results.append(PasskeyResult(prompt.length, prompt.depth, prompt.answer, reply, prompt.answer in reply))
    return results
