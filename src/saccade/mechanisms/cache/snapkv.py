"""SnapKV: the end of a prompt votes on which of its tokens stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.cache._votes import PROTOCOLS, PromptCompression
from saccade.mechanisms.cache.base import Step
from saccade.types import Kind, Pattern


@register(
    "snapkv",
    Kind.CACHE_POLICY,
    summary="Evicts all of a prompt but its end and the tokens the end attends to, pooled over neighbours.",
    other_papers=("SnapKV: LLM Knows What You are Looking for Before Generation",),
    year=2024,
    code="FasterDecoding/SnapKV",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"evicting"}),
    deviations=(
        PROTOCOLS,
        (
            "A prompt is compressed after its last token, so that decoded tokens see less than tokens of a longer "
            "prompt would: whole, in chunks (with `prompt` set) and token by token keep the same, not a prompt and "
            "its continuation."
        ),
    ),
    example={"tokens": 16, "window": 4, "kernel": 3},
    exact=lambda n: {"tokens": n + 1, "window": min(n, 32)},
    ladder=lambda n: tuple({"tokens": max(n // part, 2), "window": max(n // part // 4, 1)} for part in (16, 8, 4, 2)),
    at_budget=lambda b: {"tokens": b.count, "window": min(32, b.count // 2)},
)
@dataclass(frozen=True)
class SnapKV(PromptCompression):
    """Of a prompt keep, per key/value head, the last `window` tokens and the `tokens - window` with the most votes.

    Votes are pooled sums of softmax weights over the window's queries i, `pool(sum_i A[i, j])`; ties go to the earlier
    token. Question-aware and question-agnostic compression are told apart by what the prompt is:

        SnapKV()                     # the first call is the prompt: with the question in it, or before a question
        SnapKV(prompt=len(context))  # the context is, in any calls; a question in its last call votes not, and stays

    In the last form a question that shares a call with the context has still read all of the context.

    Args:
        tokens: Kept of a prompt per key/value head, the window included.
        window: Last tokens of the prompt, which vote and stay.
        kernel: Neighbours that votes are pooled over, odd; 1 for none.
        pooling: "mean", with zeros beyond the ends, or "max".
        prompt: Tokens of each sequence's prompt, padding not counted; None for all of the first call.
    """

    def budgets(self, votes: Tensor, prompt: Tensor, step: Step) -> Tensor:  # noqa: ARG002
        """The same for all heads."""
        return torch.full_like(prompt, self.tokens - self.window)[:, None]
