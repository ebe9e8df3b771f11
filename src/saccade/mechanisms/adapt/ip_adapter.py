"""IP-Adapter: a second cross-attention, over image tokens, beside the one over text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import register
from saccade.mechanisms.base import Layer, require
from saccade.ops import attend
from saccade.types import Kind


@register(
    "ip_adapter",
    Kind.LAYER,
    summary="Decoupled cross-attention: image tokens get keys and values of their own, the query is shared.",
    papers=("IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models",),
    year=2023,
    code="tencent-ailab/IP-Adapter",
    supports=frozenset({"backward"}),
    complexity="N",
    deviations=(
        "The cross-attention layer alone: projecting an image embedding to tokens is left to the caller.",
        "Freezing the text layer is left to the caller; `adapter_parameters` are what the paper trains.",
    ),
    example={"channels": 12, "text_channels": 10, "heads": 2, "scale": 0.7},
)
class IPAdapter(Layer):
    """out = W_o (Attn(Q, K_text, V_text) + scale * Attn(Q, K_image, V_image)).

    With `scale` 0 the image is not looked at and the text layer's output comes out exactly.

    Args:
        channels: C of the latent tokens.
        text_channels: C of the text tokens.
        image_channels: C of the image tokens; None means that of the text.
        heads: H; divides `channels`.
        scale: Weight of the image; may be set between calls.
    """

    def __init__(
        self,
        channels: int,
        text_channels: int,
        image_channels: int | None = None,
        heads: int = 8,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        require(channels >= 1, "channels", channels, "at least 1")
        require(text_channels >= 1, "text_channels", text_channels, "at least 1")
        require(heads >= 1 and channels % heads == 0, "heads", heads, f"a divisor of channels={channels}")
        base = (
            nn.Linear(channels, channels, bias=False),
            nn.Linear(text_channels, channels, bias=False),
            nn.Linear(text_channels, channels, bias=False),
            nn.Linear(channels, channels),
        )
        self._adopt(base, heads, image_channels, scale)

    @classmethod
    def from_cross_attention(
        cls,
        to_q: nn.Linear,
        to_k: nn.Linear,
        to_v: nn.Linear,
        to_out: nn.Module,
        *,
        heads: int,
        image_channels: int | None = None,
        scale: float = 1.0,
    ) -> IPAdapter:
        """Around an existing text cross-attention, whose modules are shared, not copied.

        Args:
            to_q: Latent tokens to queries.
            to_k: Text tokens to keys.
            to_v: Text tokens to values.
            to_out: Joined heads to latent tokens.
            heads: H; divides the width of the queries.
            image_channels: C of the image tokens; None means that of the text.
            scale: Weight of the image.

        Returns:
            The adapted layer.

        Raises:
            ValueError: If the projections do not fit each other or `heads`.
        """
        width = to_q.out_features
        require(heads >= 1 and width % heads == 0, "heads", heads, f"a divisor of to_q's width {width}")
        for name, linear in (("to_k", to_k), ("to_v", to_v)):
            fits = linear.out_features == width and linear.in_features == to_k.in_features
            require(fits, name, linear, f"{to_k.in_features} to {width} channels, as to_q and to_k")
        adapter = cls.__new__(cls)
        nn.Module.__init__(adapter)
        adapter._adopt((to_q, to_k, to_v, to_out), heads, image_channels, scale)  # noqa: SLF001
        return adapter

    def _adopt(
        self,
        base: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Module],
        heads: int,
        image_channels: int | None,
        scale: float,
    ) -> None:
        """Take the text layer's modules and put the image's keys and values beside them."""
        self.to_q, self.to_k, self.to_v, self.to_out = base
        self.heads, self.scale = heads, scale
        given = self.to_k.in_features if image_channels is None else image_channels
        require(given >= 1, "image_channels", image_channels, "at least 1, or None")
        like: dict[str, Any] = {"device": self.to_k.weight.device, "dtype": self.to_k.weight.dtype}
        self.to_k_image = nn.Linear(given, self.to_k.out_features, bias=False, **like)
        self.to_v_image = nn.Linear(given, self.to_v.out_features, bias=False, **like)
        if given == self.to_k.in_features:
            # The authors start from the text's projections, so that training begins near the pretrained layer.
            self.to_k_image.load_state_dict({"weight": self.to_k.weight.detach()})
            self.to_v_image.load_state_dict({"weight": self.to_v.weight.detach()})

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The new parameters, all that the paper trains in this layer."""
        return [*self.to_k_image.parameters(), *self.to_v_image.parameters()]

    def forward(self, x: Tensor, text: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        """Latent tokens attend to text and image.

        Args:
            x: `[B, M, C]`.
            text: `[B, N, C_text]`.
            image: `[B, T, C_image]`.

        Returns:
            `[B, M, C]`.

        Raises:
            ValueError: If a shape does not fit.
        """
        for name, tokens, linear in (("x", x, self.to_q), ("text", text, self.to_k), ("image", image, self.to_k_image)):
            fits = tokens.ndim == 3 and tokens.shape[0] == x.shape[0] and tokens.shape[2] == linear.in_features
            expected = f"[{x.shape[0]}, tokens, {linear.in_features}]"
            require(fits, f"{name}.shape", tuple(tokens.shape), expected)
        q = self._split(self.to_q(x))
        out = attend(q, self._split(self.to_k(text)), self._split(self.to_v(text)))
        if self.scale != 0:
            seen = attend(q, self._split(self.to_k_image(image)), self._split(self.to_v_image(image)))
            out = out + self.scale * seen
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, heads, N, C / heads]`."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    @classmethod
    def sample_inputs(
        cls, batch: int, generator: torch.Generator, dtype: torch.dtype, device: Any
    ) -> tuple[Tensor, ...]:
        """Six latent, five text and three image tokens."""
        shapes = ((batch, 6, 12), (batch, 5, 10), (batch, 3, 10))
        return tuple(torch.randn(shape, generator=generator, dtype=dtype, device=device) for shape in shapes)
