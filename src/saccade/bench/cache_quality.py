"""What a cache policy costs in quality: text that continues a compressed context, and recall from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.bench.measure import median
from saccade.models.ruler import TASKS, RecallTask, recall_tasks
from saccade.models.tasks import text_windows
from saccade.models.text import heldout_text

PROTOCOLS = ("agnostic", "aware")
"""The cache is compressed before the question is known, or with the question in the prompt."""


@dataclass(frozen=True)
class Forced:
    """One run over a prompt and then, token by token, over text that is given.

    Args:
        log_probs: Of each given token, fp32 `[r]`.
        right: Whether each was the most likely one, bool `[r]`.
        seconds: Of each step after the prompt.
        nbytes: Bytes of keys and values held at the end.
    """

    log_probs: Tensor
    right: Tensor
    seconds: list[float]
    nbytes: int


@dataclass(frozen=True)
class Quality:
    """What a cache does to a model.

    Args:
        perplexity: Of held-out text that continues a context of held-out text, decoded token by token.
        seconds: Of a decoded token, median.
        nbytes: Bytes of keys and values held after the continuation.
        found: For each protocol and task, the part of the answers that greedy decoding gives, to the last token.
        log_prob: For each protocol and task, of the answers, mean in nats.
    """

    perplexity: float
    seconds: float
    nbytes: int
    found: dict[str, dict[str, float]] = field(default_factory=dict)
    log_prob: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Material:
    """What every cache is measured on.

    Args:
        windows: int64 `[W, n]`, text; the last `steps` tokens of each are decoded.
        steps: Tokens decoded.
        tasks: Recall.
    """

    windows: Tensor
    steps: int
    tasks: Sequence[RecallTask]


def make_material(tokenizer: Any, context: int, steps: int, windows: int, tries: int) -> Material:
    """Windows of held-out text and recall tasks, none longer than `context` tokens.

    Args:
        tokenizer: The model's.
        context: Tokens of a window.
        steps: Of these, decoded one by one.
        windows: How many.
        tries: Recall tasks of each kind.

    Returns:
        The material, always the same.

    Raises:
        ValueError: If a number is out of range, or the context too short for a question.
    """
    if not 1 <= steps < context:
        raise ValueError(f"steps={steps}: expected 1 to {context - 1}, fewer than the context")
    ids = torch.tensor(tokenizer(heldout_text(), add_special_tokens=False).input_ids)
    tasks = recall_tasks(tokenizer, context, tries) if tries else []
    return Material(text_windows(ids, context, windows), steps, tasks)


@torch.no_grad()
def forced(model: Any, cache: Any, prompt: Tensor, rest: Tensor, size: Callable[[Any], int]) -> Forced:
    """Read a prompt whole, then the rest token by token, whatever the model would have said.

    Args:
        model: A transformers causal language model.
        cache: Empty; filled.
        prompt: int64 `[1, n]`.
        rest: int64 `[1, r]`; its last token is predicted, not read.
        size: Bytes that a cache holds.

    Returns:
        How likely the rest was.
    """
    found: list[Tensor] = []
    seconds: list[float] = []
    now = prompt
    for token in rest[0]:
        started = time.perf_counter()
        logits = model(input_ids=now.to(model.device), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        seconds.append(time.perf_counter() - started)
        table = logits.float().log_softmax(-1)
        found.append(torch.stack([table[token], (table.argmax() == token).float()]).cpu())
        now = token.view(1, 1)
    both = torch.stack(found)
    return Forced(both[:, 0], both[:, 1].bool(), seconds[1:], size(cache))


def measure_quality(
    model: Any, make_cache: Callable[[], Any], material: Material, size: Callable[[Any], int]
) -> Quality:
    """Perplexity, recall and speed with one kind of cache.

    Args:
        model: A transformers causal language model; for a `PagedCache`, with a recipe applied.
        make_cache: Gives an empty cache.
        material: What to read.
        size: Bytes that a cache holds.

    Returns:
        The measurements.
    """
    loss, seconds, nbytes = 0.0, list[float](), 0
    for window in material.windows:
        run = forced(model, make_cache(), window[None, : -material.steps], window[None, -material.steps :], size)
        loss -= float(run.log_probs.double().mean()) / len(material.windows)
        seconds += run.seconds
        nbytes = run.nbytes
    found: dict[str, dict[str, float]] = {}
    log_prob: dict[str, dict[str, float]] = {}
    for protocol in PROTOCOLS:
        for name in TASKS:
            runs = [recall(model, make_cache(), task, protocol, size) for task in material.tasks if task.name == name]
            if runs:
                found.setdefault(protocol, {})[name] = sum(bool(run.right.all()) for run in runs) / len(runs)
                log_prob.setdefault(protocol, {})[name] = sum(float(run.log_probs.sum()) for run in runs) / len(runs)
    return Quality(math.exp(loss), median(seconds) if seconds else math.nan, nbytes, found, log_prob)


def recall(model: Any, cache: Any, task: RecallTask, protocol: str, size: Callable[[Any], int]) -> Forced:
    """How sure a model is of an answer.

    Args:
        model: A transformers causal language model.
        cache: Empty.
        task: What to ask.
        protocol: Of `PROTOCOLS`. "agnostic" reads the question token by token, over what was kept of the context.
        size: Bytes that a cache holds.

    Returns:
        The run, of the answer's tokens only.
    """
    prompt, rest = task.context, torch.cat([task.question, task.answer], 1)
    if protocol == "aware":
        prompt, rest = torch.cat([task.context, task.question], 1), task.answer
    run = forced(model, cache, prompt, rest, size)
    count = task.answer.shape[1]
    return Forced(run.log_probs[-count:], run.right[-count:], run.seconds, run.nbytes)


__all__ = ["PROTOCOLS", "Forced", "Material", "Quality", "forced", "make_material", "measure_quality", "recall"]
