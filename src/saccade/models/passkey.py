"""Finding a pass key in a long text: prompts, and what a model answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.models.tasks import last_hidden_states, log_probs, token_log_probs
from saccade.models.text import heldout_text


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


class PasskeyLikelihood(NamedTuple):
    """How sure a model is of the right answer to a `Passkey`.

    Args:
        log_prob: Of the answer, in nats.
        found: Whether greedy decoding would give it.
        nll: Of the whole prompt, mean over its tokens in nats; None if not asked for.
    """

    log_prob: float
    found: bool
    nll: float | None = None


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
def passkey_likelihoods(
    model: Any, tokenizer: Any, prompts: Sequence[Passkey], *, score_text: bool = False
) -> list[PasskeyLikelihood]:
    """How sure the model is of each right answer: finer than whether it finds it, and one run instead of several.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        prompts: What to ask.
        score_text: Whether to score the prompts' text too, from the same runs.

    Returns:
        One for each prompt.
    """
    results = []
    for prompt in prompts:
        ids, wanted = with_answer(tokenizer, prompt, model.device)
        hidden = last_hidden_states(model, ids)
        log_prob, found = answer_likelihood(model, hidden[:-1], wanted)
        nll = -float(token_log_probs(model, hidden, ids).double().mean()) if score_text else None
        results.append(PasskeyLikelihood(log_prob, found, nll))
    return results


def with_answer(tokenizer: Any, prompt: Passkey, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """A prompt followed by its answer, int64 `[N]` on a device, and the answer alone, the end of that."""
    answer = tokenizer(" " + prompt.answer, add_special_tokens=False).input_ids
    ids = torch.cat([prompt.ids[0], torch.tensor(answer)]).to(device)
    return ids, ids[-len(answer) :]


def answer_likelihood(model: Any, hidden: Tensor, answer: Tensor) -> tuple[float, bool]:
    """Log-probability of an answer `[n]` in nats, and whether greedy decoding would give it.

    Args:
        model: A transformers causal language model.
        hidden: `[at least n, C]`, states before the output layer; the last n predict the answer.
        answer: int64.

    Returns:
        Both.
    """
    table = log_probs(model, hidden[-len(answer) :])
    return float(table.gather(-1, answer[:, None]).sum()), bool(table.argmax(-1).eq(answer).all())


@torch.no_grad()
def passkey_results(
    model: Any, tokenizer: Any, prompts: Sequence[Passkey], new_tokens: int = 8,
    make_cache: Callable[[], Any] | None = None,
) -> list[PasskeyResult]:  # fmt: skip
    """The model's greedy answer to each prompt, one prompt at a time.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        prompts: What to ask.
        new_tokens: Most tokens of an answer.
        make_cache: Gives an empty cache for each; None for transformers' own.

    Returns:
        One for each prompt.
    """
    results = []
    for prompt in prompts:
        ids = prompt.ids.to(model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id, past_key_values=None if make_cache is None else make_cache(),
        )  # fmt: skip
        reply = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        results.append(PasskeyResult(prompt.length, prompt.depth, prompt.answer, reply, prompt.answer in reply))
    return results
