"""`saccade.models.tasks` on a tiny random model and a word-level tokenizer made here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from saccade.models import tasks
from saccade.models.tasks import (
    check_head,
    language_score,
    last_hidden_states,
    perplexity,
    text_windows,
    token_kl,
    token_log_probs,
)

pytestmark = pytest.mark.quick

transformers = pytest.importorskip("transformers")


def tiny(family: str = "Llama", **changes: Any) -> Any:
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_windows_do_not_overlap_and_are_spread() -> None:
    ids = torch.arange(103)
    torch.testing.assert_close(text_windows(ids, 10), torch.arange(100).view(10, 10))
    torch.testing.assert_close(text_windows(ids, 10, 3)[:, 0], torch.tensor([0, 40, 90]))
    for message, context, count in (
        ("context=1: expected at least 2", 1, None),
        ("count=0: expected at least 1", 10, 0),
        ("text of 103 tokens: expected at least one window of 200", 200, None),
    ):
        with pytest.raises(ValueError, match=message):
            text_windows(ids, context, count)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere", "Granite"])
def test_score_is_that_of_the_models_own_loss(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SLICE", 7)
    model = tiny(family, **({"logits_scaling": 3.0} if family == "Granite" else {}))
    ids = torch.randint(40, (45,), generator=torch.Generator().manual_seed(0))
    windows = text_windows(ids, 20)
    expected = sum(model(window[None], labels=window[None]).loss.item() for window in windows) / 2
    score = language_score(model, windows)
    assert score.tokens == 38
    assert score.nll == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert perplexity(model, ids, 20) == pytest.approx(math.exp(expected), rel=1e-5)


def test_divergence_from_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SLICE", 7)
    model = tiny()
    windows = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(0))
    kept: list[torch.Tensor] = []
    language_score(model, windows, keep=kept)
    assert language_score(model, windows, kept).kl == pytest.approx(0, abs=1e-6)
    hidden = [last_hidden_states(model, window) * 1.1 for window in windows]
    with torch.no_grad():
        p, q = (model.lm_head(states).double().log_softmax(-1) for states in (kept[0], hidden[0]))
    torch.testing.assert_close(
        token_kl(model, kept[0], hidden[0]).double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-6
    )
    expected = q[:-1].gather(1, windows[0, 1:, None])[:, 0]
    torch.testing.assert_close(token_log_probs(model, hidden[0], windows[0]).double(), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="reference of 1 windows: expected 2"):
        language_score(model, windows, kept[:1])
    with pytest.raises(ValueError, match=r"reference of shape \(19, 16\): expected \(20, 16\)"):
        token_kl(model, kept[0][1:], hidden[0])


def test_a_model_with_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    check_head(model)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: torch.nn.Linear(16, 40))
    with pytest.raises(ValueError, match="LlamaForCausalLM: its logits are not its output layer's"):
        check_head(model)


def test_pair_score_is_both_scores_in_one_pass(byte_model):
    model, _ = byte_model
    ids = torch.randint(2, 250, (700,), generator=torch.Generator().manual_seed(0))
    first = tasks.last_hidden_states(model, ids)
    second = first + 0.1 * torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
    nll_first, nll_second, divergence = tasks.pair_score(model, first, second, ids)
    assert nll_first == pytest.approx(-float(tasks.token_log_probs(model, first, ids).mean()), rel=1e-5)
    assert nll_second == pytest.approx(-float(tasks.token_log_probs(model, second, ids).mean()), rel=1e-5)
    assert divergence == pytest.approx(float(tasks.token_kl(model, first, second).mean()), rel=1e-4)
    with pytest.raises(ValueError, match=r"reference of shape \(1, 32\): expected \(700, 32\)"):
        tasks.pair_score(model, first[:1], second, ids)
