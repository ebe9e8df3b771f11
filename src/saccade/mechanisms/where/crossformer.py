"""CrossFormer: attention among neighbours or among pixels at a fixed interval, with a dynamic position bias."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.mechanisms.where._windows import Partition, attend_windows, check_map, on_channels, relative_index
from saccade.types import Kind, Pattern


@register(
    "crossformer",
    Kind.LAYER,
    summary="Short- or long-distance attention (SDA, LDA), with a bias that an MLP makes from the relative position.",
    papers=("CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",),
    year=2021,
    code="cheerss/CrossFormer",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        (
            "The attention with its dynamic position bias, without the cross-scale embedding layer, norms and MLP. The "
            "selector `maxvit` is the pattern of both distances."
        ),
        (
            "The interval is ceil(side / group), that of the classification code where `group` divides the side; the "
            "detection code also has fixed intervals, which are not built. Padding is hidden, as there."
        ),
        (
            "Along an axis of at most `group` pixels all of them see each other; the authors then use short distances "
            "along both axes."
        ),
        "The bias network is dim // 16 wide, as in the code; the paper says dim / 4.",
    ),
    example={"dim": 16, "heads": 2, "group": 3, "form": "long", "bias_dim": 4},
)
class CrossFormer(Layer):
    """softmax(Q K^T / sqrt(D) + B) V inside each group, then a projection; B[i, j] = DPB(place of i - place of j).

    DPB is an MLP from the offset, counted in places of the group, to a bias for each head: Linear, then three times
    LayerNorm, ReLU, Linear.

    Args:
        dim: Channels C, in and out.
        heads: H; divides C.
        group: Side G of a group in pixels.
        form: "short": a group is a window of neighbours (SDA); "long": pixels ceil(side / G) apart (LDA).
        bias_dim: Width of the bias network; None means dim // 16, at least 2.
        qkv_bias: Bias of the query, key and value projection.
    """

    def __init__(
        self, dim: int, heads: int = 8, group: int = 7, form: Literal["short", "long"] = "short",
        bias_dim: int | None = None, qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        require(dim >= 1, "dim", dim, "at least 1 channel")
        require(heads >= 1 and dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        require(group >= 1, "group", group, "at least 1 pixel")
        require(form in ("short", "long"), "form", form, "'short' or 'long'")
        require(bias_dim is None or bias_dim >= 1, "bias_dim", bias_dim, "at least 1, or None")
        self.dim, self.heads, self.group, self.form = dim, heads, group, form
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.projection = nn.Linear(dim, dim)
        width = max(2, dim // 16) if bias_dim is None else bias_dim
        layers: list[nn.Module] = [nn.Linear(2, width)]
        for out in (width, width, heads):
            layers += [nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out)]
        self.position = nn.Sequential(*layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Feature map `[B, C, height, width]` to the same shape, any height and width."""
        (x,) = inputs
        check_map(x, self.dim)
        partition = Partition.of(x, self.group, dilated=self.form == "long")
        windows = partition.split(on_channels(self.qkv, x))
        out = attend_windows(windows, self.heads, self._bias(partition, x), partition.segments(len(x), x.device))
        return on_channels(self.projection, partition.join(out))

    def _bias(self, partition: Partition, x: Tensor) -> Tensor:
        """The bias network, once for each offset: `[1, H, places, places]`."""
        steps = (torch.arange(1 - side, side, device=x.device, dtype=x.dtype) for side in partition.window)
        table = self.position(torch.cartesian_prod(*steps))
        return table[relative_index(partition.window, partition.window, x.device)].permute(2, 0, 1)[None]

    @classmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """A 6 x 7 map of 16 channels."""
        return (torch.randn(batch, 16, 6, 7, generator=generator).to(device, dtype),)
