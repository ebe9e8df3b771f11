"""IP-Adapter against its two softmaxes written out head by head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from saccade.mechanisms.adapt.ip_adapter import IPAdapter

pytestmark = pytest.mark.quick


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`[B, M, C]` from unsplit projections."""
    width = q.shape[2] // heads
    parts = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        weights = torch.exp(q[..., part] @ k[..., part].mT / math.sqrt(width))
        parts.append(weights / weights.sum(-1, keepdim=True) @ v[..., part])
    return torch.cat(parts, 2)


def oracle(module: IPAdapter, x: Tensor, text: Tensor, image: Tensor) -> Tensor:
    def project(tokens: Tensor, linear: nn.Linear) -> Tensor:
        return tokens @ linear.weight.T

    q = project(x, module.to_q)
    words = attention(q, project(text, module.to_k), project(text, module.to_v), module.heads)
    picture = attention(q, project(image, module.to_k_image), project(image, module.to_v_image), module.heads)
    return (words + module.scale * picture) @ module.to_out.weight.T + module.to_out.bias


def inputs(channels: int, text: int, image: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    shapes = ((2, 7, channels), (2, 5, text), (2, 3, image))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize(("channels", "text", "image", "heads"), [(6, 6, None, 2), (8, 5, 9, 4), (5, 4, 7, 1)])
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
def test_matches_the_oracle(channels: int, text: int, image: int | None, heads: int, scale: float) -> None:
    torch.manual_seed(0)
    module = IPAdapter(channels, text, image, heads=heads, scale=scale).double()
    for parameter in module.adapter_parameters():
        nn.init.normal_(parameter)
    given = [x.requires_grad_() for x in inputs(channels, text, text if image is None else image)]
    out, expected = module(*given), oracle(module, *given)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(out)
    wanted = [*given, *module.parameters()]
    got = torch.autograd.grad((out * weight).sum(), wanted)
    for gradient, reference in zip(got, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-9)


def base(channels: int, text: int) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    torch.manual_seed(1)
    return (
        nn.Linear(channels, channels).double(),
        nn.Linear(text, channels, bias=False).double(),
        nn.Linear(text, channels, bias=False).double(),
        nn.Linear(channels, channels).double(),
    )


def test_scale_zero_is_the_existing_layer_exactly_whatever_the_image() -> None:
    layers = base(6, 4)
    x, text, image = inputs(6, 4, 9)
    plain = IPAdapter.from_cross_attention(*layers, heads=2, image_channels=9, scale=0.0)
    q, k, v = (layer(tokens) for layer, tokens in zip(layers, (x, text, text), strict=False))
    expected = layers[3](attention(q, k, v, 2))
    torch.testing.assert_close(plain(x, text, image), expected, rtol=0, atol=1e-12)
    assert torch.equal(plain(x, text, image * torch.nan), plain(x, text, image))
    plain.scale = 1.0
    assert not torch.equal(plain(x, text, image), expected)


def test_existing_modules_are_shared_and_the_new_ones_start_from_them() -> None:
    layers = base(6, 4)
    module = IPAdapter.from_cross_attention(*layers, heads=3, scale=0.5)
    assert module.to_q is layers[0]
    assert module.to_out is layers[3]
    assert torch.equal(module.to_k_image.weight, layers[1].weight)
    assert torch.equal(module.to_v_image.weight, layers[2].weight)
    assert module.to_k_image.weight is not layers[1].weight
    assert sum(p.numel() for p in module.adapter_parameters()) == 2 * 6 * 4
    x, text, _ = inputs(6, 4, 4)
    q, k, v = (layer(tokens) for layer, tokens in zip(layers, (x, text, text), strict=False))
    # The image being the text, both attentions are the same.
    torch.testing.assert_close(module(x, text, text), layers[3](1.5 * attention(q, k, v, 3)), rtol=0, atol=1e-12)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="heads=4: expected a divisor of channels=6"):
        IPAdapter(6, 4, heads=4)
    with pytest.raises(ValueError, match="heads=4: expected a divisor of to_q's width 6"):
        IPAdapter.from_cross_attention(*base(6, 4), heads=4)
    q, k, _, out = base(6, 4)
    with pytest.raises(ValueError, match=r"to_v=Linear\(in_features=5.*expected 4 to 6 channels"):
        IPAdapter.from_cross_attention(q, k, nn.Linear(5, 6), out, heads=2)
    module = IPAdapter(6, 4, heads=2)
    with pytest.raises(ValueError, match=r"text.shape=\(2, 5, 3\): expected \[2, tokens, 4\]"):
        module(torch.zeros(2, 7, 6), torch.zeros(2, 5, 3), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"image.shape=\(1, 3, 4\): expected \[2, tokens, 4\]"):
        module(torch.zeros(2, 7, 6), torch.zeros(2, 5, 4), torch.zeros(1, 3, 4))
