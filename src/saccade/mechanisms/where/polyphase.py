"""Adaptive polyphase anchoring: windows begin where the map is strongest, so that they move along with it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import check_map
from saccade.mechanisms.where.twins import Twins
from saccade.types import Kind, Pattern


@register(
    "polyphase",
    Kind.LAYER,
    summary="Windowed or subsampled attention whose grid is anchored on the map: circular shifts shift the output.",
    papers=("Reviving Shift Equivariance in Vision Transformers",),
    year=2023,
    code="willding123/Shift-Equivariant-Vision-Transformers",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N^2",
    deviations=(
        (
            "Shown on Twins' two attentions; `anchored` does the same to any layer on feature maps. The depthwise "
            "convolution that encodes positions is not built."
        ),
        (
            "The output is moved back, which makes it equivariant to every circular shift; the authors leave it where "
            "the anchor is (`restore=False`), equivariant up to shifts by whole windows."
        ),
        "Maps need not be square. If two phases are equally strong, the first one wins, and equivariance is lost.",
        "Work is that of `twins`.",
    ),
    example={"dim": 16, "heads": 2, "size": 3},
)
class Polyphase(Layer):
    """roll(f(roll(x, -a)), a), with the anchor a = argmax over phases p of the sum of x[p + size * n]^2 over n.

    f is window attention, or attention to one summary of each window. No gradient goes through the choice of a.

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        size: Side of a window in pixels, and so the number of phases along each axis.
        form: "local": attention inside windows; "global": of all pixels to one summary of each window.
        restore: Move the output back to where the input was.
        qkv_bias: Bias of the query, key and value projections.
    """

    def __init__(
        self, dim: int, heads: int = 8, size: int = 7, form: Literal["local", "global"] = "local",
        restore: bool = True, qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        require(form in ("local", "global"), "form", form, "'local' or 'global'")
        self.dim, self.size, self.restore = dim, size, restore
        self.layer = Twins(dim, heads, size, form, qkv_bias)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape; height and width are multiples of `size`."""
        (x,) = inputs
        check_map(x, self.dim)
        return anchored(self.layer, x, self.size, restore=self.restore)

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 6 x 9 map of 16 channels."""
        return (torch.randn(batch, 16, 6, 9, generator=generator).to(device, dtype),)


def anchored(layer: nn.Module, x: Tensor, stride: int, *, restore: bool = True) -> Tensor:
    """`layer` on each map of a batch, moved so that its strongest phase comes first.

    Args:
        layer: From feature maps `[B, C, Y, X]` to feature maps; equivariant to circular shifts by `stride`.
        x: `[B, C, Y, X]`.
        stride: Of the layer's windows or subsampling; divides Y and X.
        restore: Move the output, which then must have the shape of x, back. Without, it may have any (for example
            that of a patch embedding).

    Returns:
        What the layer gives.

    Raises:
        ValueError: If `stride` does not divide the sides: circular shifts then mix the phases.
    """
    if any(size % stride for size in x.shape[2:]):
        raise ValueError(f"x of shape {tuple(x.shape)}: expected height and width that are multiples of {stride}")
    anchor = strongest_phase(x.detach(), stride)
    out = layer(roll_each(x, -anchor))
    return roll_each(out, anchor) if restore else out


def strongest_phase(x: Tensor, stride: int) -> Tensor:
    """Row and column of the phase of largest Euclidean norm, the first of those that tie.

    Args:
        x: `[B, C, Y, X]`.
        stride: Pixels from one place of a phase to the next; divides Y and X.

    Returns:
        int64 `[B, 2]`, each in [0, stride).
    """
    x = x.double()  # so that the order in which a shifted map is added up does not decide
    energy = x.square().sum(1).unflatten(2, (-1, stride)).unflatten(1, (-1, stride)).sum((1, 3))
    best = energy.flatten(1).argmax(1)
    return torch.stack([best // stride, best % stride], 1)


def roll_each(x: Tensor, shift: Tensor) -> Tensor:
    """Each map of `[B, C, Y, X]` rolled down and to the right by its row of `shift` `[B, 2]`."""
    for axis in (2, 3):
        size, view = x.shape[axis], [-1, 1, 1, 1]
        place = (torch.arange(size, device=x.device) - shift[:, axis - 2, None]) % size  # [B, size]
        view[axis] = size
        x = x.gather(axis, place.view(view).expand_as(x))
    return x
