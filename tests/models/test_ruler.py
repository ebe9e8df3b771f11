"""Recall tasks: deterministic, of the asked length, with what is asked for in the context once it is hidden."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from saccade.models.ruler import TASKS, multikey, recall_tasks, variables


@pytest.mark.parametrize("name", TASKS)
def test_context_holds_the_answer_and_the_question_does_not(byte_model: tuple[Any, Any], name: str) -> None:
    tokenizer = byte_model[1]
    tasks = recall_tasks(tokenizer, 900, tries=3, names=[name])
    assert len(tasks) == 3
    for task in tasks:
        total = task.context.shape[1] + task.question.shape[1] + task.answer.shape[1]
        assert total == 900
        context, question = (tokenizer.decode(x[0]) for x in (task.context, task.question))
        assert task.words in context
        assert task.words not in question
        assert question.rstrip().endswith(("is", "number"))
        assert tokenizer.decode(task.answer[0]) == " " + task.words


def test_same_seed_same_tasks(byte_model: tuple[Any, Any]) -> None:
    first, again, other = (recall_tasks(byte_model[1], 700, tries=2, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.context, b.context) and a.words == b.words for a, b in zip(first, again, strict=True))
    assert [a.words for a in first] != [b.words for b in other]


def test_what_is_hidden() -> None:
    hidden = multikey(random.Random(0), keys=3)
    asked = hidden.reply.split()[-2]
    assert [n for n in hidden.needles if asked in n] == [
        f"The magic number of {asked} is {hidden.answer}. Remember it."
    ]
    chain = variables(random.Random(0), hops=2, chains=2)
    values = {}
    for needle in chain.needles:
        name, value = needle.removeprefix("VAR ").rstrip(".").split(" = ")
        values[name] = values[value.removeprefix("VAR ")] if value.startswith("VAR") else value
    assert len(values) == 6
    assert values[chain.reply.split()[-2]] == chain.answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 100}, "length=100: too short"),
        ({"length": 900, "tries": 0}, "tries=0: expected at least 1"),
        ({"length": 900, "names": ["x"]}, "names='x': expected some of passkey, multikey, variables"),
    ],
)
def test_bad_input(byte_model: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recall_tasks(byte_model[1], **options)
