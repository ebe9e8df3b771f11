"""MSA-Conv, pixel by pixel: the window cut out of a padded map, softmax over all its places, then the convolution."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.msa_conv import MSAConv


def oracle(layer, x, stride):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    depth, side, reach = dim // layer.heads, layer.kernel, layer.kernel // 2
    kernel = weights["convolution.weight"]
    rows, columns = range(0, height, stride), range(0, width, stride)
    out = x.new_empty(batch, len(kernel), len(rows), len(columns))
    steps = [(m, n) for m in range(-reach, reach + 1) for n in range(-reach, reach + 1)]
    for b in range(batch):
        pixels = {(i, j): x[b, :, i, j] for i in range(height) for j in range(width)}
        qkv = {at: (weights["qkv.weight"] @ token + weights["qkv.bias"]).split(dim) for at, token in pixels.items()}
        beyond = (x.new_zeros(dim),) * 3
        mixed = {}
        for (i, j), token in pixels.items():
            seen = [qkv.get((i + m * layer.dilation, j + n * layer.dilation), beyond) for m, n in steps]
            heads = []
            for h in range(layer.heads):
                mine = slice(h * depth, (h + 1) * depth)
                scores = torch.stack([qkv[i, j][0][mine] @ key[mine] / depth**0.5 for _, key, _ in seen])
                heads.append(torch.softmax(scores, 0) @ torch.stack([value[mine] for *_, value in seen]))
            mixed[i, j] = token + torch.cat(heads)
        for row, i in enumerate(rows):
            for column, j in enumerate(columns):
                total = x.new_zeros(len(kernel))
                for m, n in steps:
                    if (i + m, j + n) in mixed:
                        total = total + kernel[:, :, m + reach, n + reach] @ mixed[i + m, j + n]
                out[b, :, row, column] = total.clamp(min=0)
    assert side == 2 * reach + 1
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = MSAConv(**{"dim": 4, "heads": 2} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((4, 5), {"heads": 1}),
        ((5, 3), {"stride": 2, "out_dim": 3}),
        ((6, 7), {"dilation": 2, "heads": 4}),
        ((3, 4), {"kernel": 5, "dilation": 3}),
        ((1, 1), {}),
        ((2, 3), {"kernel": 1}),
    ],
)
def test_attention_in_the_kernel_equals_the_code(shape, settings):
    layer = build(**settings)
    x = torch.randn(1, 4, *shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x, settings.get("stride", 1))
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_places_beyond_the_map_weigh_as_scores_of_zero():
    """One pixel of score 0 in a window of nine: a ninth of its value."""
    layer = build(dim=1, heads=1)
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.tensor([[0.0], [0.0], [1.0]]))
        layer.qkv.bias.zero_()
        layer.convolution.weight.fill_(1)
    x = torch.full((1, 1, 1, 1), 9.0, dtype=torch.float64)
    assert layer(x).item() == pytest.approx(9 + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1 channel"),
        ({"out_dim": 0}, "out_dim=0: expected None, or at least 1 channel"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"kernel": 2}, "kernel=2: expected an odd number of pixels"),
        ({"stride": 0}, "stride=0: expected at least 1 pixel"),
        ({"dilation": 0}, "dilation=0: expected at least 1 pixel"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MSAConv(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
