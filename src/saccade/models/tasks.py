"""How well a language model predicts text: perplexity, and divergence from another run.

Both work on the last hidden states `[N, C]` of a run, not its logits: for 8,192 tokens and 49,152 words these
are 19 MB instead of 1.6 GB, and logits are made from them a slice at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SLICE = 128
"""Tokens whose logits are held at a time: few enough that the C library reuses their memory instead of returning it."""


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
    parts = []
    for part, target in slices:
        table = logits(model, part).float()
        parts.append(table.gather(1, target[:, None])[:, 0] - table.logsumexp(-1))
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
