"""iLLaMA's soft mask: bidirectional attention that becomes causal in the course of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from saccade.catalog import register
from saccade.mechanisms.base import Mixer, require
from saccade.ops import attend
from saccade.types import Kind, Pattern


@register(
    "soft_mask",
    Kind.MIXER,
    summary="Weights on later tokens fade from 1 to 0 over training, so that a bidirectional model becomes causal.",
    papers=("Adapting LLaMA Decoder to Vision Transformer",),
    year=2024,
    code="techmonsterwang/iLLaMA",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward", "gqa"}),
    exact_when="softness = 1",
    complexity="N^2",
    deviations=(
        "The soft mask and its schedule alone; the class token behind the image and the model itself are not built.",
        (
            "Weights are masked after the softmax and not renormalised, as the authors do: even at softness 0 they "
            "depend on later tokens, so causal self-attention is not listed above."
        ),
    ),
    example={"softness": 0.4},
    exact=lambda n: {"softness": 1.0},  # noqa: ARG005
)
@dataclass(frozen=True)
class SoftMask(Mixer):
    """out_i = sum_j m_ij p_ij v_j, p = softmax(Q K^T / sqrt(D)) over all tokens, m_ij = 1 for j <= i, else `softness`.

    Computed from two exact attentions and their log-sum-exps: softness * full + (1 - softness) * exp(lse of the causal
    one - lse of the full one) * causal.

    Args:
        softness: 1 is bidirectional; `soft_mask_schedule` takes it to 0.
    """

    softness: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.softness <= 1, "softness", self.softness, "in [0, 1]")

    def mix(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, state: Any) -> tuple[Tensor, None]:  # noqa: ARG002
        """Two attentions, or one at an end of the schedule."""
        full, total = attend(q, k, v, return_lse=True)
        if self.softness == 1 or total is None:
            return full, None
        past, seen = attend(q, k, v, causal=True, return_lse=True)
        share = (seen - total).exp()[..., None].to(q.dtype)  # type: ignore[operator]
        return self.softness * full + (1 - self.softness) * share * past, None


def soft_mask_schedule(
    step: int, steps: int, form: Literal["linear", "constant"] = "linear", softness: float = 1.0
) -> float:
    """The softness at a training step: 0 from `steps` on.

    Args:
        step: Counted from 0.
        steps: How many are soft, at least 1; the first epochs of training.
        form: "linear" falls from `softness` to 0 at the last of them, "constant" stays.
        softness: At the start.

    Returns:
        In [0, 1].

    Raises:
        ValueError: If an argument is out of range.
    """
    require(step >= 0, "step", step, "at least 0")
    require(steps >= 1, "steps", steps, "at least 1")
    require(form in ("linear", "constant"), "form", form, "'linear' or 'constant'")
    require(0 <= softness <= 1, "softness", softness, "in [0, 1]")
    if step >= steps:
        return 0.0
    return softness if form == "constant" or steps == 1 else softness * (1 - step / (steps - 1))
