"""`saccade.models.passkey` on a tiny random model and a tokenizer made here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saccade.models.passkey import passkey_likelihoods, passkey_prompts, passkey_results

pytestmark = pytest.mark.quick

pytest.importorskip("transformers")


class Characters:
    """A tokenizer with one token per character."""

    pad_token_id = 0
    chat_template = None

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": [ord(letter) % 40 for letter in text]})

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(48 + int(i) % 10) for i in ids)


def test_passkey_prompts_are_deterministic_and_as_long_as_asked() -> None:
    prompts = passkey_prompts(Characters(), [300, 400], [0.0, 0.5, 1.0], seed=3)
    again = passkey_prompts(Characters(), [300, 400], [0.0, 0.5, 1.0], seed=3)
    assert [prompt.ids.shape[1] for prompt in prompts] == [300] * 3 + [400] * 3
    assert len({prompt.answer for prompt in prompts}) == 6
    for one, two in zip(prompts, again, strict=True):
        assert one.answer == two.answer
        torch.testing.assert_close(one.ids, two.ids)
    with pytest.raises(ValueError, match="depth=1.5: expected a number in"):
        passkey_prompts(Characters(), [300], [1.5])
    with pytest.raises(ValueError, match="length=20: too short for the question"):
        passkey_prompts(Characters(), [20], [0.5])


def test_the_number_is_found_where_the_depth_says() -> None:
    tokenizer = Characters()
    for prompt in passkey_prompts(tokenizer, [2000], [0.1, 0.9]):
        needle = tokenizer(prompt.answer).input_ids
        ids = prompt.ids[0].tolist()
        places = [place for place in range(len(ids)) if ids[place : place + 5] == needle]
        assert places
        assert abs(places[0] / 2000 - prompt.depth) < 0.1


def test_passkey_results_read_the_greedy_answer(byte_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = byte_model[0], Characters()
    prompt = passkey_prompts(tokenizer, [300], [0.5])[0]
    result = passkey_results(model, tokenizer, [prompt], new_tokens=3)[0]
    assert len(result.reply) <= 3
    assert not result.found
    answer = torch.tensor([[ord(letter) % 10 for letter in prompt.answer]])
    monkeypatch.setattr(type(model), "generate", lambda self, ids, **_: torch.cat([ids, (answer + 2) % 10], 1))
    assert passkey_results(model, tokenizer, [prompt])[0].found


def test_likelihood_of_the_right_answer_is_the_sum_over_its_tokens(byte_model: tuple[Any, Any]) -> None:
    model, tokenizer = byte_model
    prompt = passkey_prompts(tokenizer, [300], [0.5], haystack="abc " * 200)[0]
    value, found, nll = passkey_likelihoods(model, tokenizer, [prompt], score_text=True)[0]
    answer = tokenizer(" " + prompt.answer, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt.ids, torch.tensor([answer])], 1)).logits[0].log_softmax(-1)
    rows = logits[prompt.ids.shape[1] - 1 : -1]
    assert value == pytest.approx(sum(float(row[token]) for row, token in zip(rows, answer, strict=True)), abs=1e-4)
    assert found == all(int(row.argmax()) == token for row, token in zip(rows, answer, strict=True))
    whole = torch.cat([prompt.ids[0], torch.tensor(answer)])
    assert nll == pytest.approx(-float(logits[:-1].gather(1, whole[1:, None]).mean()), abs=1e-4)
    assert passkey_likelihoods(model, tokenizer, [prompt])[0].nll is None
