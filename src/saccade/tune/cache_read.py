"""What a model makes of a prompt's end when the cache was cut before: the question comes to what was kept without it.

Prompts are read in two parts. After the first one the cache evicts and packs; the tail, with the question and the
answer in it, is read in pieces from what is left. What the tail's likelihood loses is what the cache costs, together
with whatever else the recipe does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.models.passkey import Passkey, PasskeyLikelihood, answer_likelihood, with_answer
from saccade.models.tasks import token_log_probs
from saccade.tune.cache_score import tail_length

PIECE = 16
"""Tokens of the tail that are read at a time; eviction comes after each piece, as after each token in decoding."""


class TailAnswer(NamedTuple):
    """What became of one prompt.

    Args:
        log_prob: Of the answer, in nats.
        found: Whether greedy decoding would give it.
        nll: Of the tail, mean over its tokens in nats.
        nbytes: Bytes of keys and values held at its end.
    """

    log_prob: float
    found: bool
    nll: float
    nbytes: int

    def likelihood(self, *, text: bool) -> PasskeyLikelihood:
        """As the search judges it, with the likelihood of the text or without."""
        return PasskeyLikelihood(self.log_prob, self.found, self.nll if text else None)


@torch.no_grad()
def read_tail(model: Any, ids: Tensor, tail: int, cache: Any) -> tuple[Tensor, Any]:
    """Hidden states that predict the last `tail` tokens, `[tail, C]`, and the cache.

    Args:
        model: A transformers causal language model.
        ids: int64 `[N]`.
        tail: Tokens read after the cache was cut, less than N.
        cache: Empty; None lets transformers make its own.

    Returns:
        Hidden states before the output layer, and the filled cache.
    """
    body = getattr(model, model.base_model_prefix)
    states: list[Tensor] = []
    for piece in (ids[:-tail], *ids[-tail:].split(PIECE)):
        out = body(input_ids=piece[None].to(model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        states.append(out.last_hidden_state[0] if states else out.last_hidden_state[0, -1:].clone())
    return torch.cat(states)[:-1], cache


@torch.no_grad()
def tail_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Passkey], make_cache: Callable[[], Any] = lambda: None
) -> list[TailAnswer]:
    """How likely the ends of prompts and their answers are.

    Args:
        model: A transformers causal language model; for a `PagedCache`, with a recipe applied.
        tokenizer: Its tokenizer.
        prompts: What to ask.
        make_cache: Gives an empty cache for each; None lets transformers make its own.

    Returns:
        One for each prompt.
    """
    from saccade.plug.cache import cache_bytes

    results = []
    for prompt in prompts:
        ids, answer = with_answer(tokenizer, prompt, model.device)
        tail = tail_length(ids.shape[0])
        hidden, cache = read_tail(model, ids, tail, make_cache())
        log_prob, found = answer_likelihood(model, hidden, answer)
        results.append(TailAnswer(log_prob, found, tail_nll(model, hidden, ids[-tail:]), cache_bytes(cache)))
    return results


def tail_nll(model: Any, hidden: Tensor, ids: Tensor) -> float:
    """Mean negative log-likelihood of tokens `[n]` from the hidden states that predict them, `[n, C]`, in nats."""
    states = torch.cat([hidden, hidden[-1:]])  # the last one predicts nothing
    return -float(token_log_probs(model, states, torch.cat([ids[:1], ids])).double().mean())


__all__ = ["PIECE", "TailAnswer", "read_tail", "tail_answers", "tail_nll"]
