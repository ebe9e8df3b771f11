"""Recall from long contexts, generated in the manner of RULER: a pass key, one of several keys, a chain of variables.

RULER (Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?") hides short
sentences in filler text and asks for what they say. The sentences here are Saccade's own wording. Context and question
are kept apart, so that a cache may be compressed before the question is known, or after.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.models.text import heldout_text

MARK = "<|cut here|>"
"""Stands between context and question while a chat template is filled in."""


@dataclass(frozen=True, eq=False)
class RecallTask:
    """A text with something hidden in it, and what is asked about it.

    Args:
        name: Key of `TASKS`.
        context: int64 `[1, n]`: what is read first.
        question: int64 `[1, m]`: the question, up to where the answer begins.
        answer: int64 `[1, a]`.
        words: The answer as text.
    """

    name: str
    context: Tensor
    question: Tensor
    answer: Tensor
    words: str


class Hidden(NamedTuple):
    """What is hidden, in this order; what to do with it; the question, the beginning of the reply, and its rest."""

    needles: tuple[str, ...]
    order: str
    question: str
    reply: str
    answer: str


def passkey(rng: random.Random) -> Hidden:
    """One number."""
    key = str(rng.randint(10_000, 99_999))
    order = "Read the text. A pass key is hidden in it. Remember the pass key."
    needle = f"The pass key is the number {key}. Remember it. The pass key is the number {key}."
    return Hidden((needle,), order, "What is the pass key?", "The pass key is the number", key)


def multikey(rng: random.Random, keys: int = 4) -> Hidden:
    """One of several numbers with names (RULER's multi-key needles).

    Args:
        rng: What is drawn comes from here.
        keys: Numbers hidden; one is asked for.

    Returns:
        What is hidden.
    """
    names = rng.sample(NAMES, keys)
    numbers = [str(rng.randint(10_000, 99_999)) for _ in names]
    needles = tuple(f"The magic number of {a} is {b}. Remember it." for a, b in zip(names, numbers, strict=True))
    wanted = rng.randrange(keys)
    order = "Read the text. Magic numbers of some cities are hidden in it. Remember them."
    ask, reply = f"What is the magic number of {names[wanted]}?", f"The magic number of {names[wanted]} is"
    return Hidden(needles, order, ask, reply, numbers[wanted])


def variables(rng: random.Random, hops: int = 3, chains: int = 2) -> Hidden:
    """The value at the end of a chain of assignments, beside other chains (RULER's variable tracking, asked forwards).

    RULER asks for all names of one value; a small model answers that with none. Here one variable is asked for, and its
    value stands `hops` assignments earlier.

    Args:
        rng: What is drawn comes from here.
        hops: Assignments from variable to variable.
        chains: Chains; one is asked for.

    Returns:
        What is hidden.
    """
    letters = rng.sample(string.ascii_uppercase, chains * (hops + 1))
    rows = [letters[i::chains] for i in range(chains)]
    values = [str(rng.randint(10_000, 99_999)) for _ in rows]
    needles = []
    for hop in range(hops + 1):
        for row, value in zip(rows, values, strict=True):
            needles.append(f"VAR {row[hop]} = {value if hop == 0 else 'VAR ' + row[hop - 1]}.")
    wanted = rng.randrange(chains)
    last = rows[wanted][-1]
    order = "Read the text. Assignments of variables are hidden in it. Follow them."
    return Hidden(
        tuple(needles), order, f"What is the value of VAR {last}?", f"The value of VAR {last} is", values[wanted]
    )


NAMES = (
    "Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Riga", "Lima", "Dakar", "Kyoto", "Perth", "Boston", "Turin",
    "Cairo", "Havana", "Delhi", "Bergen",
)  # fmt: skip

TASKS: dict[str, Callable[[random.Random], Hidden]] = {
    "passkey": passkey,
    "multikey": multikey,
    "variables": variables,
}


def recall_tasks(
    tokenizer: Any, length: int, tries: int = 4, seed: int = 0, names: Sequence[str] = tuple(TASKS),
    haystack: str | None = None,
) -> list[RecallTask]:  # fmt: skip
    """Some of each task, each with a piece of text, names and numbers of its own.

    Args:
        tokenizer: A transformers tokenizer; its chat template is used if it has one.
        length: Tokens of context, question and answer together.
        tries: Of each task; what is hidden begins at evenly spread depths.
        seed: Same seed, same tasks.
        names: Keys of `TASKS`.
        haystack: Text to hide in; None means the held-out built-in text. Repeated if too short.

    Returns:
        The tasks, by name.

    Raises:
        ValueError: If a name is unknown, `tries` is less than 1, or the length too short.
    """
    if tries < 1:
        raise ValueError(f"tries={tries}: expected at least 1")
    source = tokenizer(heldout_text() if haystack is None else haystack, add_special_tokens=False).input_ids
    tasks = []
    for name in names:
        if name not in TASKS:
            raise ValueError(f"names={name!r}: expected some of {', '.join(TASKS)}")
        for number in range(tries):
            rng = random.Random(f"{seed} {name} {number}")  # noqa: S311 - reproducible, not secret
            hidden = TASKS[name](rng)
            tasks.append(_task(tokenizer, name, source, hidden, length, (number + 0.5) / tries, rng))
    return tasks


def _task(
    tokenizer: Any, name: str, source: list[int], hidden: Hidden, length: int, depth: float, rng: random.Random
) -> RecallTask:
    """Fill the prompt with text until it has the asked length; text may tokenise differently once cut."""
    start = rng.randrange(len(source))
    answer = tokenizer(" " + hidden.answer, add_special_tokens=False).input_ids
    room = length - len(answer) - sum(map(len, _prompt(tokenizer, hidden, list(hidden.needles))))
    while room >= 8:
        looped = (source * (1 + (start + room) // len(source)))[start : start + room]
        # One needle lies at the depth itself, several are spread evenly, moved by it.
        count = len(hidden.needles)
        cuts = [round((i + depth) / count * room) for i in range(count)]
        pieces = [tokenizer.decode(looped[a:b]) for a, b in zip([0, *cuts], [*cuts, room], strict=True)]
        parts = [pieces[0]]
        for needle, piece in zip(hidden.needles, pieces[1:], strict=True):
            parts += [needle, piece]
        context, question = _prompt(tokenizer, hidden, parts)
        over = len(context) + len(question) + len(answer) - length
        if over <= 0:
            # The text that ends the context goes on by what joining the pieces has saved: all tasks are equally long.
            context = context + [source[(start + room + i) % len(source)] for i in range(-over)]
            ids, asked, expected = (torch.tensor([part]) for part in (context, question, answer))
            return RecallTask(name, ids, asked, expected, hidden.answer)
        room -= over
    raise ValueError(f"length={length}: too short for the question and some text around what is hidden")


def _prompt(tokenizer: Any, hidden: Hidden, parts: list[str]) -> tuple[list[int], list[int]]:
    """Token ids of the context and of the question; the text between context and question is cut at a paragraph."""
    content = hidden.order + "\n\n" + "\n\n".join(parts) + MARK + "\n\n" + hidden.question
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": content}]
        content = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    else:
        content += "\n\n"
    before, after = content.split(MARK)
    special = tokenizer.chat_template is None
    first = tokenizer(before, add_special_tokens=special).input_ids
    if special and tokenizer.eos_token_id is not None and first[-1:] == [tokenizer.eos_token_id]:
        first = first[:-1]
    return first, tokenizer(after + hidden.reply, add_special_tokens=False).input_ids


__all__ = ["TASKS", "Hidden", "RecallTask", "multikey", "passkey", "recall_tasks", "variables"]
