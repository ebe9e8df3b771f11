"""Sparsifiner: a low-rank sketch of the attention map says which keys each query attends to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._blocks import largest
from saccade.ops import attend, gather_attend
from saccade.types import Kind, Pattern, TokenIndex

WORKSPACE = 2**24
"""Scores of pairs that the predictor holds at once, one row of them for each head at least."""


@register(
    "sparsifiner",
    Kind.LAYER,
    summary="A learned low-rank map scores all pairs; each query attends to the keys that score highest.",
    papers=("Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",),
    year=2023,
    code="lim142857/Sparsifiner",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    training_free=False,
    exact_when="keep = 1",
    complexity="N^2",
    deviations=(
        (
            "Scores of pairs are formed for some queries at a time, never all. They are the N^2 part of the work, with "
            "`coefficients` products a pair at best; the authors' code, as this one, takes all of the basis."
        ),
        (
            "Of keys that score alike the first are kept. Token pruning, the fixed thresholds that may stand in for "
            "both choices of the largest, and the loss that distils predictions are not built."
        ),
        (
            "`reconstruction_loss` trains the predictor alone, toward the layer's own full attention; the authors' "
            "first stage takes that of a frozen teacher and trains all weights."
        ),
    ),
    example={"dim": 16, "tokens": 20, "heads": 2, "keep": 0.4, "reduce_tokens": 4, "coefficients": 3},
)
class Sparsifiner(Layer):
    """Attention(q_i, K_S(i), V_S(i)), then a projection, with S(i) the keys of the `keep` N largest scores A[i].

    A = C |U|, entries of U up to `threshold` dropped; C = softmax(q' (W_n k')^T / sqrt(H)), in which all but the
    `coefficients` largest of a row are dropped; q' and k' are queries and keys mapped to fewer channels, W_n and U map
    tokens to fewer tokens and back. Class tokens attend to all.

    The choice is not differentiated: its weights learn from `reconstruction_loss`.

    Args:
        dim: Channels C, in and out.
        tokens: N, the number of tokens, which U fixes.
        heads: H; divides C.
        keep: Fraction of the keys that a query attends to, rounded up to whole keys.
        reduce_tokens: N over the rank of the map.
        reduce_channels: D over the channels of q' and k'.
        coefficients: Entries kept in a row of C.
        threshold: Entries of |U| up to this are dropped.
        class_tokens: Tokens at the beginning that attend to all.
        qkv_bias: Bias of the query, key and value projection.
    """

    def __init__(
        self,
        dim: int,
        tokens: int = 197,
        heads: int = 6,
        keep: float = 0.25,
        reduce_tokens: int = 6,
        reduce_channels: int = 2,
        coefficients: int = 8,
        threshold: float = 0.02,
        class_tokens: int = 1,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(tokens >= 1, "tokens", tokens, "at least 1")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(0 < keep <= 1, "keep", keep, "a fraction of the keys in (0, 1]")
        require(1 <= reduce_tokens <= tokens, "reduce_tokens", reduce_tokens, f"from 1 to tokens={tokens}")
        depth = dim // heads
        require(
            1 <= reduce_channels <= depth, "reduce_channels", reduce_channels, f"from 1 to {depth}, those of a head"
        )
        require(coefficients >= 1, "coefficients", coefficients, "at least 1")
        require(threshold >= 0, "threshold", threshold, "at least 0")
        require(0 <= class_tokens <= tokens, "class_tokens", class_tokens, f"from 0 to tokens={tokens}")
        self.dim, self.count, self.heads, self.class_tokens = dim, tokens, heads, class_tokens
        self.budget, self.coefficients, self.threshold = math.ceil(keep * tokens), coefficients, threshold
        rank = tokens // reduce_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.projection = nn.Linear(dim, dim)
        self.sketch_query = nn.Linear(depth, depth // reduce_channels)
        self.sketch_key = nn.Linear(depth, depth // reduce_channels)
        self.gather_tokens = nn.Parameter(torch.empty(rank, tokens))
        self.basis = nn.Parameter(torch.empty(rank, tokens))
        for weight in (self.gather_tokens, self.basis):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to tokens `[B, N, C]`, class tokens first."""
        q, k, v = self._split(*inputs)
        first, others = q.split([self.class_tokens, self.count - self.class_tokens], 2)
        chosen = TokenIndex(self.connectivity(others.detach(), k.detach()), others.shape[2], self.count)
        out = torch.cat([attend(first, k, v), gather_attend(others, k, v, chosen)], 2)
        return self.projection(out.transpose(1, 2).flatten(2))

    def connectivity(self, q: Tensor, k: Tensor) -> Tensor:
        """The keys that each query attends to.

        Args:
            q: `[B, H, M, D]`, without the class tokens.
            k: `[B, H, N, D]`.

        Returns:
            int64 `[B, H, M, keep N]`, those of the largest scores first.
        """
        coefficients = self._coefficients(q, k)
        coefficients = coefficients.where(largest(coefficients, self.coefficients), 0.0)
        basis = self.basis.abs()
        basis = basis.where(basis > self.threshold, 0.0)
        best = [
            (part @ basis).sort(stable=True, dim=-1, descending=True).indices[..., : self.budget]
            for part in coefficients.split(self._rows(q), 2)
        ]
        return torch.cat(best, 2)

    def reconstruction_loss(self, *inputs: Tensor) -> Tensor:
        """Squared difference of the map before any choice, C U, and the layer's own full attention.

        Args:
            *inputs: As for `forward`.

        Returns:
            A scalar, summed over all pairs but those of class tokens, averaged over the batch. Its gradient reaches the
            weights of the predictor alone.
        """
        q, k, _ = (part.detach() for part in self._split(*inputs))
        q = q[:, :, self.class_tokens :]
        total = q.new_zeros(())
        for part, asked in zip(
            self._coefficients(q, k).split(self._rows(q), 2), q.split(self._rows(q), 2), strict=True
        ):
            attention = (asked @ k.mT * k.shape[3] ** -0.5).softmax(-1)
            total = total + (part @ self.basis - attention).square().sum()
        return total / len(q)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, H, N, D]`."""
        if x.ndim != 3 or x.shape[1:] != (self.count, self.dim):
            raise ValueError(f"x of shape {tuple(x.shape)}: expected [B, {self.count}, {self.dim}]")
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _coefficients(self, q: Tensor, k: Tensor) -> Tensor:
        """C: `[B, H, M, rank]`."""
        keys = self.gather_tokens @ self.sketch_key(k)
        return (self.sketch_query(q) @ keys.mT * self.heads**-0.5).softmax(-1)

    def _rows(self, q: Tensor) -> int:
        """Queries whose scores of all keys are held at once."""
        return max(1, WORKSPACE // max(q.shape[0] * self.heads * self.count, 1))

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """20 tokens of 16 channels."""
        return (torch.randn(batch, 20, 16, generator=generator).to(device, dtype),)
