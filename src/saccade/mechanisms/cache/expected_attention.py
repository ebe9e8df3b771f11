"""Expected attention: keep what the queries to come are expected to attend to, told from the prompt's own queries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import require
from saccade.mechanisms.cache._votes import complete, prompt_of
from saccade.mechanisms.cache.base import CachePolicy, Step, best
from saccade.mechanisms.cache.store import KVStore
from saccade.ops.checks import accumulation_dtype, resolve_scale
from saccade.types import Kind, Pattern


@register(
    "expected_attention",
    Kind.CACHE_POLICY,
    summary="Evicts the tokens of a prompt that Gaussian queries of its mean and covariance would attend to least.",
    other_papers=("Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",),
    year=2025,
    code="NVIDIA/kvpress",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    supports=frozenset({"gqa"}),
    training_free=True,
    exact_when="tokens >= N",
    complexity="N",
    effects=frozenset({"evicting"}),
    deviations=(
        (
            "The model's rotary frequencies are a setting (`rope`): queries come rotated and are turned back by it. "
            "The turn is that of Llama's layout, pairs (i, i + r) of the first 2 r channels; interleaved pairs and "
            "rotations that change with the length of the text are not covered."
        ),
        (
            "Statistics are of the queries themselves, so biases of their projection and norms of queries count; in "
            "the releases of the authors' code that were read, the projection's weight alone does."
        ),
        (
            "Statistics come from the prompt's queries in the call that completes it: a prompt in chunks is judged by "
            "its last chunk, and one fed token by token by a single query. What is decoded is kept; the authors' "
            "library can also compress while decoding, from a buffer of recent hidden states."
        ),
        "All key/value heads keep as many, without Ada-KV's budgets, which the authors' library can add.",
    ),
    example={"tokens": 16, "sinks": 2, "future": 8},
    exact=lambda n: {"tokens": max(n, 5)},
    ladder=lambda n: tuple({"tokens": max(n // part, 2), "sinks": 1} for part in (16, 8, 4, 2)),
    at_budget=lambda b: {"tokens": b.count, "rope": b.rope},
)
@dataclass(frozen=True)
class ExpectedAttention(CachePolicy):
    """Of a prompt keep, per key/value head, the first `sinks` tokens and of the rest the `tokens - sinks` best.

    With mu and Sigma the mean and covariance of a head's unrotated queries, and `R = mean_f R_f` the mean rotation of
    the `future` positions after the prompt, a key k (rotated, as stored) is given the expected score of a Gaussian
    query, and these a softmax over the tokens to choose from:

        z_j = scale (R mu) k_j + scale^2 / 2 k_j^T (R Sigma R^T) k_j,    a = softmax(z)

    A token's worth is `(mean_h a[h, j] + epsilon) |v_j|`, over the query heads h that share its key; ties go to the
    earlier token. Queries of the first `sinks` tokens count not. Prompts of at most `tokens` tokens stay whole.

    Args:
        tokens: Kept of a prompt per key/value head, the sinks included.
        sinks: First tokens, which always stay.
        future: Positions after the prompt that the rotation is averaged over.
        rope: Base of the model's rotary embedding, or its frequencies (radians a position, at most D / 2; channels
            beyond twice as many are not rotated), as a model with scaled frequencies has them; None for no rotation.
        covariance: Whether Sigma counts, or the mean alone.
        value_norms: Whether a is multiplied by the length of the value.
        epsilon: Added to a before, in attention.
        prompt: Tokens of each sequence's prompt, padding not counted; None for all of the first call.
    """

    tokens: int = 2048
    sinks: int = 4
    future: int = 512
    rope: float | tuple[float, ...] | None = 10000.0
    covariance: bool = True
    value_norms: bool = True
    epsilon: float = 0.0
    prompt: int | None = None

    def __post_init__(self) -> None:
        require(self.sinks >= 0, "sinks", self.sinks, "at least 0 tokens")
        require(self.tokens > self.sinks, "tokens", self.tokens, f"more than sinks={self.sinks}")
        require(self.future >= 1, "future", self.future, "at least 1 position")
        rope = self.rope
        fine = rope is None or (all(map(math.isfinite, rope)) if isinstance(rope, tuple) else 0 < rope < math.inf)
        require(fine, "rope", rope, "a base above 0, finite frequencies, or None")
        require(0 <= self.epsilon < math.inf, "epsilon", self.epsilon, "at least 0, finite")
        require(self.prompt is None or self.prompt >= 1, "prompt", self.prompt, "at least 1 token, or None")

    def keep(self, q: Tensor, store: KVStore, step: Step) -> Tensor | None:
        """At the end of the prompt the sinks, the best, and what came after the prompt."""
        prompt = prompt_of(self.prompt, q, store)
        if prompt is None:
            return None
        ready = complete(prompt, store) & (prompt > self.tokens)
        if not bool(ready.any()):
            return None
        positions = store.positions
        choice = (positions >= self.sinks) & (positions < prompt[:, None, None])
        worth = self._worth(q, store, prompt, choice, step).masked_fill(~choice, -torch.inf)
        return best(worth, self.tokens - self.sinks) | ~choice | ~ready[:, None, None]

    def _worth(self, q: Tensor, store: KVStore, prompt: Tensor, choice: Tensor, step: Step) -> Tensor:
        """`[B, G, n]`; of no meaning where `choice` `[B, G, n]` is False."""
        dtype, scale = accumulation_dtype(q.dtype), resolve_scale(step.scale, q.shape[-1])
        mean, covariance = self._future_queries(q.to(dtype), store, prompt)
        keys, share = store.keys.to(dtype), q.shape[1] // choice.shape[1]
        total = torch.zeros(choice.shape, dtype=dtype, device=q.device)
        for i in range(share):  # one query head of each group at a time: keys are never repeated
            scores = scale * (keys @ mean[:, i::share, :, None])[..., 0]
            if self.covariance:
                scores = scores + scale**2 / 2 * ((keys @ covariance[:, i::share]) * keys).sum(-1)
            total += scores.masked_fill(~choice, -torch.inf).softmax(-1).nan_to_num(0.0) / share
        return (total + self.epsilon) * store.values.to(dtype).norm(dim=-1) if self.value_norms else total

    def _future_queries(self, q: Tensor, store: KVStore, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[B, H, D]` and covariance `[B, H, D, D]` of the prompt's queries, turned to the positions to come."""
        place = store.seen[:, None] + torch.arange(-q.shape[2], 0, device=q.device)
        counted = ((place >= self.sinks) & (place < prompt[:, None])).to(q.dtype)
        weights = counted / counted.sum(1, keepdim=True).clamp(min=1)
        frequencies = self._frequencies(q)
        # the mean rotation is linear: turning every query by it, after turning it back, gives R mu and R Sigma R^T
        ahead = torch.arange(self.future, device=q.device) + prompt[:, None]
        angles = ahead[..., None] * frequencies
        towards = torch.polar(torch.ones_like(angles), angles).mean(1)
        angles = -place[..., None] * frequencies
        turns = torch.polar(torch.ones_like(angles), angles) * towards[:, None]
        turned = _rotated(q, turns[:, None].to(q.dtype.to_complex()))
        mean = (turned * weights[:, None, :, None]).sum(2)
        centred = (turned - mean[:, :, None]) * weights.sqrt()[:, None, :, None]
        return mean, centred.transpose(-1, -2) @ centred if self.covariance else mean[..., None]

    def _frequencies(self, q: Tensor) -> Tensor:
        """Radians a position, `[r]`, in fp64: positions are large."""
        half = q.shape[-1] // 2
        if isinstance(self.rope, tuple):
            require(len(self.rope) <= half, "rope", self.rope, f"at most {half} frequencies, half of the channels")
            return torch.tensor(self.rope, dtype=torch.float64, device=q.device)
        if self.rope is None:
            return torch.zeros(0, dtype=torch.float64, device=q.device)
        return self.rope ** -(torch.arange(half, dtype=torch.float64, device=q.device) / max(half, 1))


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Channels i and i + r of `[..., D]` as complex numbers times `turns` `[..., r]`; those beyond 2 r as they are."""
    pairs = turns.shape[-1]
    first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), -1)
    return torch.cat(
        (first * turns.real - second * turns.imag, first * turns.imag + second * turns.real, rest), -1
    )  # fmt: skip


__all__ = ["ExpectedAttention"]
