"""What a cache policy costs in quality: text that continues a compressed context, and recall from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.bench.cache_prompt import Counted, Prompt
from saccade.mechanisms.cache.base import CachePolicy
from saccade.models.ruler import TASKS, recall_tasks
from saccade.models.tasks import text_windows
from saccade.models.text import heldout_text

PROTOCOLS = ("agnostic", "aware")
"""The cache is compressed before the question is known, or with the question in the prompt."""


@dataclass(frozen=True, eq=False)
class Questions:
    """Recall tasks of one shape.

    Args:
        names: Of the tasks, one per row.
        ids: int64 `[B, n]`: context, question and answer.
        question: Tokens of the longest question.
        answer: Tokens of the answers.
    """

    names: tuple[str, ...]
    ids: Tensor
    question: int
    answer: int


@dataclass(frozen=True, eq=False)
class Material:
    """What every cache is measured on.

    Args:
        windows: int64 `[W, n]`, text; the last `steps` tokens of each are decoded.
        steps: Tokens decoded.
        questions: Recall, or None.
    """

    windows: Tensor
    steps: int
    questions: Questions | None


@dataclass(frozen=True)
class Kept:
    """What a cache holds and reads beside dense attention on the same tokens.

    Args:
        nbytes: Bytes held at the end, of one sequence.
        held: Part of the dense cache's bytes.
        read: Part of the bytes that dense decoding reads, counted where a policy is counted; mean over the steps.
    """

    nbytes: int
    held: float
    read: float


def make_material(tokenizer: Any, context: int, steps: int, windows: int, tries: int) -> Material:
    """Windows of held-out text and recall tasks of `context` tokens each.

    Args:
        tokenizer: The model's.
        context: Tokens of a window.
        steps: Of these, decoded one by one.
        windows: How many.
        tries: Recall tasks of each kind; 0 for none.

    Returns:
        The material, always the same.

    Raises:
        ValueError: If a number is out of range, or the context too short for a question.
    """
    if not 1 <= steps < context:
        raise ValueError(f"steps={steps}: expected 1 to {context - 1}, fewer than the context")
    ids = torch.tensor(tokenizer(heldout_text(), add_special_tokens=False).input_ids)
    questions = _questions(tokenizer, context, tries) if tries else None
    return Material(text_windows(ids, context, windows), steps, questions)


def _questions(tokenizer: Any, context: int, tries: int) -> Questions:
    tasks = recall_tasks(tokenizer, context, tries)
    answers = {task.answer.shape[1] for task in tasks}
    if len(answers) > 1:
        raise ValueError(f"tokenizer: answers of {sorted(answers)} tokens, expected numbers of one length")
    ids = torch.cat([torch.cat([task.context, task.question, task.answer], 1) for task in tasks])
    return Questions(tuple(t.name for t in tasks), ids, max(t.question.shape[1] for t in tasks), answers.pop())


@torch.no_grad()
def forced(model: Any, cache: Any, logits: Tensor | None, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Decode text that is given, token by token, whatever the model would have said.

    Args:
        model: A transformers causal language model.
        cache: Filled with a prompt; grows by all but the last token.
        logits: After the prompt, `[B, V]`; None where the first token does not count.
        rest: int64 `[B, r]`.

    Returns:
        Log-probability of each token, fp32 `[B, r]`, and whether it was the most likely one, bool `[B, r]`.
    """
    found: list[Tensor] = []
    last = rest.shape[1] - 1
    for place, now in enumerate(rest.unbind(1)):
        if logits is None:
            found.append(torch.zeros(len(now), 2))
        else:
            table = logits.float().log_softmax(-1).cpu()
            found.append(torch.stack([table.gather(1, now[:, None])[:, 0], (table.argmax(-1) == now).float()], 1))
        if place < last:
            logits = model(input_ids=now[:, None].to(model.device), past_key_values=cache).logits[:, -1]
    both = torch.stack(found, 1)
    return both[..., 0], both[..., 1].bool()


def text_quality(
    model: Any, cache: Any, counted: Counted | None, prompt: Prompt, material: Material, size: Callable[[Any], int]
) -> dict[str, Any]:
    """Perplexity of the windows' ends, and bytes.

    Args:
        model: A transformers causal language model.
        cache: Empty.
        counted: Its policy; None for dense.
        prompt: Of the windows' beginnings.
        material: The windows.
        size: Bytes that a cache holds.

    Returns:
        `perplexity` over all windows, `losses` of each in nats a token, and the fields of `Kept`.
    """
    _filled(prompt, cache, counted)
    log_probs, _ = forced(model, cache, prompt.logits, material.windows[:, -material.steps :])
    losses = [-float(row) for row in log_probs.double().mean(1)]
    kept = _kept(cache, counted, prompt, material.windows.shape[1] - material.steps, material.steps, size)
    return {"perplexity": math.exp(sum(losses) / len(losses)), "losses": losses, **vars(kept)}


def recall_quality(
    model: Any, cache: Any, counted: Counted | None, prompt: Prompt, questions: Questions, protocol: str,
    size: Callable[[Any], int],
) -> dict[str, Any]:  # fmt: skip
    """How sure a model is of the answers.

    Args:
        model: A transformers causal language model.
        cache: Empty.
        counted: Its policy; None for dense.
        prompt: Of contexts and questions.
        questions: The tasks.
        protocol: Of `PROTOCOLS`. "agnostic" reads the question, the longest one's number of tokens in every row, token
            by token over what was kept of the context.
        size: Bytes that a cache holds.

    Returns:
        For each task, `found`: the part of the answers that greedy decoding gives to the last token; `log_prob`: of an
        answer, mean in nats; and the fields of `Kept`.
    """
    start = questions.ids.shape[1] - questions.answer - (questions.question if protocol == "agnostic" else 0)
    _filled(prompt, cache, counted, start)
    rest = questions.ids[:, start:]
    log_probs, right = forced(model, cache, None if protocol == "agnostic" else prompt.logits, rest)
    sums, exact = log_probs[:, -questions.answer :].sum(1), right[:, -questions.answer :].all(1)
    rows = {task: torch.tensor([name == task for name in questions.names]) for task in TASKS}
    return {
        "found": {task: float(exact[row].float().mean()) for task, row in rows.items()},
        "log_prob": {task: float(sums[row].mean()) for task, row in rows.items()},
        **vars(_kept(cache, counted, prompt, start, rest.shape[1], size)),
    }


def _filled(prompt: Prompt, cache: Any, counted: Counted | None, tokens: int | None = None) -> None:
    """Fill a cache; what was read for that is not counted."""
    prompt.fill(cache, tokens)
    if counted is not None:
        counted.nbytes = 0


def _kept(
    cache: Any, counted: Counted | None, prompt: Prompt, start: int, steps: int, size: Callable[[Any], int]
) -> Kept:
    """Bytes after `steps - 1` decoded tokens on top of `start`."""
    token, batch = prompt.token_nbytes, len(prompt.logits)
    lengths: Sequence[int] = range(start + 1, start + steps)
    read = 1.0 if counted is None else counted.nbytes / max(1, token * sum(lengths))
    return Kept(size(cache) // batch, size(cache) / (token * (start + steps - 1)), read)


def caches_of(
    model: Any, twin: Any, policy: CachePolicy | None, *, count: bool = True
) -> tuple[Any, Any, Counted | None]:
    """The model to decode with, an empty cache, and what counts its reading.

    Args:
        model: As transformers runs it.
        twin: With a recipe.
        policy: Of the cache; None for dense.
        count: Whether to count what it reads.

    Returns:
        Model, cache, and the counted policy or None.
    """
    from transformers import DynamicCache

    from saccade.plug import PagedCache

    if policy is None:
        return model, DynamicCache(), None
    counted = Counted(policy) if count else None
    return twin, PagedCache(twin, counted or policy), counted


__all__ = [
    "PROTOCOLS", "Kept", "Material", "Questions", "caches_of", "forced", "make_material", "recall_quality",
    "text_quality",
]  # fmt: skip
