"""FoPE: rotary embedding whose every pair is a Fourier series, without frequencies too low for the training length."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import SELF_PATTERNS, Position, require
from saccade.ops.checks import accumulation_dtype
from saccade.types import Kind


@register(
    "fope",
    Kind.POSITION,
    summary="RoPE with each rotation a mixture of frequencies; those too low for the training length are zero.",
    papers=("Fourier Position Embedding: Enhancing Attention's Periodic Extension for Length Generalization",),
    other_papers=("RoFormer: Enhanced Transformer with Rotary Position Embedding",),
    year=2024,
    code="TsinghuaC3I/Fourier-Position-Embedding",
    patterns=SELF_PATTERNS,
    supports=frozenset({"backward", "bias", "dropout", "gqa", "lse", "streaming"}),
    training_free=False,
    exact_when="frequencies = 0, which is no position at all",
    complexity="N",
    heads_differ=True,
    deviations=(
        (
            "Pairs below the floor frequency keep cos = 1, sin = 0, the zero frequency of the paper; the authors' code "
            "pads both with 1, and lets at most D / 4 pairs rotate, where this one rotates every pair that is left."
        ),
        (
            "With fewer key/value heads than query heads, a query head has the coefficients of the key head it reads; "
            "the authors' models have as many of either."
        ),
    ),
    example={"head_dim": 8, "heads": 2, "train_length": 64},
    exact=lambda n: {"head_dim": 8, "heads": 2, "train_length": n, "frequencies": 0},
)
class FoPE(Position, nn.Module):
    """Pair m of head h turns by sum_w cos_coef[h, w, m] cos(w n) and sum_w sin_coef[h, w, m] sin(w n).

    The frequencies w are RoPE's, theta^(-2i / D), as far as they complete a period within the training length,
    w >= 2 pi / train_length; pairs of lower frequency do not turn. The coefficients are the identity plus noise and, as
    in the paper, fixed. With identity coefficients and every frequency left it is RoPE. Pair m is made of channels m
    and m + D / 2.

    Args:
        head_dim: D, even.
        heads: G, key/value heads, each with coefficients of its own; query heads are a multiple.
        train_length: Tokens of the training context, for the floor frequency.
        theta: Base of the frequencies.
        gain: Of the Xavier-normal noise on the identity; the authors use 0.3 to 0.6, more for larger models. 0: none.
        frequencies: How many of the highest frequencies are left; None means those at or above the floor.
        learned: Whether the coefficients are trained.
        device: Of the coefficients.
        dtype: Of the coefficients.
    """

    frequency: Tensor

    def __init__(
        self,
        head_dim: int,
        heads: int,
        train_length: int = 2048,
        theta: float = 10000.0,
        gain: float = 0.3,
        frequencies: int | None = None,
        learned: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(head_dim >= 2 and head_dim % 2 == 0, "head_dim", head_dim, "an even number of at least 2")
        require(heads >= 1, "heads", heads, "at least 1")
        require(train_length >= 1, "train_length", train_length, "at least 1 token")
        require(theta > 0, "theta", theta, "more than 0")
        require(gain >= 0, "gain", gain, "at least 0")
        pairs = head_dim // 2
        in_range = frequencies is None or 0 <= frequencies <= pairs
        require(in_range, "frequencies", frequencies, f"0 to head_dim / 2 = {pairs}, or None")
        self.head_dim, self.heads, self.gain = head_dim, heads, gain
        frequency = [theta ** (-2 * pair / head_dim) for pair in range(pairs)]
        floor = 2 * math.pi / train_length
        left = [w for w in frequency if w >= floor] if frequencies is None else sorted(frequency)[pairs - frequencies :]
        # fp64 whatever the module is cast to: a rounded frequency is a wrong phase far from the start
        self.frequency = torch.tensor(sorted(left, reverse=True), dtype=torch.float64)
        shape = (heads, len(left), len(left))
        self.cos_coef = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=learned)
        self.sin_coef = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=learned)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity plus Xavier-normal noise times `gain`, drawn from the global generator."""
        for coefficients in (self.cos_coef, self.sin_coef):
            with torch.no_grad():
                if self.gain > 0 and coefficients.numel():
                    nn.init.xavier_normal_(coefficients, gain=self.gain)
                else:
                    coefficients.zero_()
                coefficients.diagonal(dim1=1, dim2=2).add_(1.0)

    def encode(self, x: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys `[B, H, M, D]` with their places mixed in.

        Args:
            x: `[B, H, M, D]`, H a multiple of `heads`; head h uses coefficients h // (H / heads).
            positions: int `[M]` or `[B, M]`.

        Returns:
            `[B, H, M, D]` in the dtype of `x`.

        Raises:
            ValueError: If the heads, the head dim or the positions do not fit.
        """
        self._check(x, positions)
        accumulate = accumulation_dtype(x.dtype)
        phase = positions.to(torch.float64)[..., None] * self.frequency.to(x.device)
        cos = self._series(phase.cos().to(accumulate), self.cos_coef, x.shape[1], still=1.0)
        sin = self._series(phase.sin().to(accumulate), self.sin_coef, x.shape[1], still=0.0)
        first, second = x.to(accumulate).chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """`encode`."""
        return self.encode(x, positions)

    def _series(self, waves: Tensor, coefficients: Tensor, heads: int, still: float) -> Tensor:
        """`[B or 1, H, M, D / 2]`: the waves `[(B,) M, K]` mixed for each head, `still` for the pairs left out."""
        waves = waves[None] if waves.ndim == 2 else waves
        mixed = torch.einsum("bnw,hwm->bhnm", waves, coefficients.to(waves.dtype))
        mixed = nn.functional.pad(mixed, (0, self.head_dim // 2 - mixed.shape[-1]), value=still)
        return mixed.repeat_interleave(heads // self.heads, 1)

    def _check(self, x: Tensor, positions: Tensor) -> None:
        if x.ndim != 4 or x.shape[3] != self.head_dim or x.shape[1] % self.heads:
            wanted = f"[B, a multiple of {self.heads}, M, {self.head_dim}]"
            raise ValueError(f"x of shape {tuple(x.shape)}: expected {wanted}")
        if tuple(positions.shape) not in ((x.shape[2],), (x.shape[0], x.shape[2])):
            raise ValueError(
                f"positions of shape {tuple(positions.shape)}: expected [{x.shape[2]}] or {list(x.shape[::2])}"
            )
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise ValueError(f"positions of dtype {positions.dtype}: expected an integer dtype")
