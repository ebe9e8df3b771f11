"""SPA: a gate selects the informative tokens of each image, which are packed into containers of one length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.ops import attend
from saccade.types import Kind, Pattern


@register(
    "select_and_pack",
    Kind.LAYER,
    summary="A supervised gate selects tokens; as many as each image needs are packed and attend to each other.",
    papers=("Context-Aware Token Selection and Packing for Enhanced Vision Transformer",),
    year=2024,
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        "The authors published no code. The layer alone: its Swin blocks, with their shift, are left to the model.",
        (
            "Every image begins a container of its own, so that its output does not depend on its batch; the authors "
            "fill containers across images and mask what is of another one."
        ),
        "Of tokens that are not selected the paper says nothing further: they get 0 before the last projection.",
        "In evaluation the gate is not noisy.",
    ),
    example={"dim": 8, "heads": 2, "container": 4},
)
class SelectAndPack(Layer):
    """s = max(gate(x), previous); tokens with sigmoid(s) > threshold are packed, each as sigmoid(s) x, and attend.

    In training the choice is that of a binary Gumbel-softmax, and its gradient passes straight through. Selected tokens
    of an image, in their order, fill containers of `container` places; tokens of one container attend to each other.

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        container: Tokens that attend to each other; the authors' is the square of Swin's window side.
        threshold: Probability, in [0, 1], above which a token is selected.
        temperature: Of the Gumbel-softmax.
        qkv_bias: Bias of the query, key and value projection.
    """

    def __init__(
        self, dim: int, heads: int = 8, container: int = 49, threshold: float = 0.5, temperature: float = 1.0,
        qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(container >= 1, "container", container, "at least 1 token")
        require(0 <= threshold <= 1, "threshold", threshold, "a probability in [0, 1]")
        require(temperature > 0, "temperature", temperature, "above 0")
        self.dim, self.heads, self.container = dim, heads, container
        self.threshold, self.temperature = threshold, temperature
        self.gate = nn.Linear(dim, 1)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.projection = nn.Linear(dim, dim)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tokens `[B, N, C]`, and scores `[B, N]` of an earlier stage if there is one, to `[B, N, C]`."""
        x, previous = inputs if len(inputs) == 2 else (inputs[0], None)
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected tokens [B, N, {self.dim}]")
        scores = self.scores(x, previous)
        chance = self._chance(scores)
        kept = chance > self.threshold
        gated = scores.sigmoid()[..., None] * x
        if self.training:
            gated = gated * (1 + chance - chance.detach())[..., None]  # a choice of 1 that feels its chance's gradient
        slot, count = self._slots(kept)
        places = count * self.container
        source = torch.full((places + 1,), -1, device=x.device)
        source = source.scatter(0, slot, torch.arange(len(slot), device=x.device))[:places]
        packed = gated.flatten(0, 1).index_select(0, source.clamp(min=0)).unflatten(0, (count, self.container))
        ids = (source >= 0).long().view(count, self.container) - 1
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(packed).chunk(3, -1))
        out = attend(q, k, v, q_segments=ids, kv_segments=ids).transpose(1, 2).reshape(places, self.dim)
        out = nn.functional.pad(out, (0, 0, 0, 1)).index_select(0, slot).view_as(x)
        return self.projection(out)

    def scores(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """Scores `[B, N]` of tokens `[B, N, C]`, at least those of an earlier stage, brought to this resolution."""
        scores = self.gate(x)[..., 0]
        if previous is None:
            return scores
        if previous.shape != scores.shape:
            raise ValueError(f"previous of shape {tuple(previous.shape)}: expected {tuple(scores.shape)}")
        return torch.maximum(scores, previous)

    @staticmethod
    def selection_loss(scores: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of scores `[B, N]` and what should be selected, in [0, 1]; the paper weighs it 0.01."""
        return nn.functional.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype))

    def _chance(self, scores: Tensor) -> Tensor:
        """How likely each token is selected, `[B, N]`; in training disturbed by the noise of a Gumbel-softmax."""
        if not self.training:
            return scores.sigmoid()
        noise = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6).logit()  # the difference of two Gumbel variables
        return ((scores + noise) / self.temperature).sigmoid()

    def _slots(self, kept: Tensor) -> tuple[Tensor, int]:
        """Place in the containers of each token, int64 `[B * N]`, behind all if not kept; and how many containers."""
        batch, tokens = kept.shape
        if torch.compiler.is_compiling() or kept.is_meta:  # shapes may not depend on what was selected
            most = max(-(-tokens // self.container), 1)
            first, count = torch.arange(batch, device=kept.device) * most, batch * most
        else:
            needed = -(-kept.sum(1) // self.container)
            first, count = needed.cumsum(0) - needed, max(int(needed.sum()), 1)
        slot = first[:, None] * self.container + kept.cumsum(1) - 1
        return torch.where(kept, slot, count * self.container).flatten(), count

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """Fourteen tokens of 8 channels."""
        return (torch.randn(batch, 14, 8, generator=generator).to(device, dtype),)
