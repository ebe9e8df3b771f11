"""TiC's MSA-Conv: self-attention inside every window of a convolution, and the convolution over its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._grids import Line
from saccade.mechanisms.where._windows import check_map, on_channels
from saccade.ops import gather_attend, merge
from saccade.ops.checks import accumulation_dtype
from saccade.types import Boxes, Kind, Pattern


@register(
    "msa_conv",
    Kind.LAYER,
    summary="A convolution whose pixels first attend to the others under its kernel, also dilated or strided.",
    papers=("TiC: Exploring Vision Transformer in Convolution",),
    year=2023,
    code="StriveZs/MSA-Conv",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        (
            "The authors' code has one head, which is the default here. Kernels are odd; the convolution is padded by "
            "half of them (theirs by a setting, 1)."
        ),
        "No dropout. TiC's multi-directional cyclic shifts and inter-pooling are not in the public code and not built.",
    ),
    example={"dim": 16, "heads": 2, "dilation": 2, "stride": 2},
)
class MSAConv(Layer):
    """ReLU(Conv(x + y)) with y_i = softmax over the kernel^2 places j around i of (q_i k_j / sqrt(D)) v_j.

    Places beyond the map are keys and values of 0: they take part in the softmax. The convolution has the same kernel,
    not dilated.

    Args:
        dim: Channels C.
        out_dim: Channels of the output; None means `dim`.
        heads: H; divides C. With as many heads as channels this is the depthwise form.
        kernel: Side of the window in pixels, odd.
        stride: Of the convolution; the attention has every pixel.
        dilation: Gap between the places of a window.
    """

    def __init__(
        self, dim: int, out_dim: int | None = None, heads: int = 1, kernel: int = 3, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(out_dim is None or out_dim >= 1, "out_dim", out_dim, "None, or at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(kernel >= 1 and kernel % 2 == 1, "kernel", kernel, "an odd number of pixels")
        require(stride >= 1, "stride", stride, "at least 1 pixel")
        require(dilation >= 1, "dilation", dilation, "at least 1 pixel")
        self.dim, self.heads, self.kernel, self.dilation = dim, heads, kernel, dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        outs = dim if out_dim is None else out_dim
        self.convolution = nn.Conv2d(dim, outs, kernel, stride, padding=kernel // 2, bias=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to `[B, out_dim, ceil(height / stride), ceil(width / stride)]`."""
        (x,) = inputs
        check_map(x, self.dim)
        q, k, v = (part.flatten(2).unflatten(1, (self.heads, -1)).mT for part in on_channels(self.qkv, x).chunk(3, 1))
        lines = [window_line(size, self.kernel, self.dilation) for size in x.shape[2:]]
        near = gather_attend(q, k, v, Boxes.of(lines), return_lse=True)
        rows, columns = ((line.last - line.first) // line.step + 1 for line in lines)
        beyond = (self.kernel**2 - rows[:, None] * columns).flatten().to(x.device, accumulation_dtype(x.dtype))
        zeros = torch.zeros_like(near.out), beyond.log().expand(near.out.shape[:3])  # as many scores and values of 0
        out = merge([near, zeros]).out
        return torch.relu(self.convolution(x + out.mT.flatten(1, 2).unflatten(2, x.shape[2:])))

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 5 x 6 map of 16 channels."""
        return (torch.randn(batch, 16, 5, 6, generator=generator).to(device, dtype),)


def window_line(size: int, kernel: int, dilation: int) -> Line:
    """The places `dilation` apart that a window of `kernel` of them, centred on each place of an axis, has on it."""
    place = torch.arange(size)
    reach = dilation * (kernel // 2)
    first = torch.maximum(place - reach, place % dilation)
    last = torch.minimum(place + reach, place + (size - 1 - place) // dilation * dilation)
    return Line(first, last, dilation, min(kernel, -(-size // dilation)))
