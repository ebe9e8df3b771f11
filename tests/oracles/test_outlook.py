"""Outlook attention, window by window: what each place of it gives to the pixel there."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.outlook import Outlook


def oracle(layer, x):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    depth, side, stride = dim // layer.heads, layer.kernel, layer.stride
    out = torch.empty_like(x)
    for b in range(batch):
        pixels = {(i, j): x[b, :, i, j] for i in range(height) for j in range(width)}
        values = {at: weights["value.weight"] @ token + weights.get("value.bias", 0) for at, token in pixels.items()}
        sums = {at: x.new_zeros(dim) for at in pixels}
        for i in range(0, height, stride):
            for j in range(0, width, stride):
                cell = [
                    token for (m, n), token in pixels.items() if m // stride * stride == i and n // stride * stride == j
                ]
                scores = weights["weights.weight"] @ (sum(cell) / len(cell)) + weights["weights.bias"]
                scores = scores.view(layer.heads, side**2, side**2) / depth**0.5
                places = [(i + m - side // 2, j + n - side // 2) for m in range(side) for n in range(side)]
                seen = torch.stack([values.get(at, x.new_zeros(dim)) for at in places])
                for a, at in enumerate(places):
                    if at in sums:
                        mixed = [
                            torch.softmax(scores[h, a], 0) @ seen[:, h * depth : (h + 1) * depth]
                            for h in range(layer.heads)
                        ]
                        sums[at] = sums[at] + torch.cat(mixed)
        for (i, j), total in sums.items():
            out[b, :, i, j] = weights["projection.weight"] @ total + weights["projection.bias"]
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = Outlook(**{"dim": 4, "heads": 2} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((4, 6), {}),
        ((5, 3), {"qkv_bias": True}),
        ((4, 3), {"stride": 1}),
        ((7, 4), {"stride": 3}),
        ((3, 4), {"kernel": 5, "stride": 2}),
        ((2, 3), {"kernel": 1, "stride": 1}),
    ],
)
def test_outlook_attention_equals_the_paper(shape, settings):
    layer = build(**settings)
    x = torch.randn(2, 4, *shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_without_scores_it_is_a_mean_of_means():
    """Kernel 3, stride 1, 1 x 3 pixels: each window gives each of its pixels (sum of its values) / 9."""
    layer = build(dim=1, heads=1, stride=1)
    with torch.no_grad():
        layer.weights.weight.zero_()
        layer.weights.bias.zero_()
        for part in (layer.value, layer.projection):
            part.weight.fill_(1)
        layer.projection.bias.zero_()
    x = torch.tensor([9.0, 18.0, 36.0], dtype=torch.float64).view(1, 1, 1, 3)
    # windows around 9, 18, 36 hold 27, 63, 54; a pixel lies in its own and the next ones
    assert layer(x).flatten().tolist() == pytest.approx([3 + 7, 3 + 7 + 6, 7 + 6])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1 channel"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"kernel": 2}, "kernel=2: expected an odd number of pixels"),
        ({"stride": 4}, "stride=4: expected at least 1 and at most kernel=3"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Outlook(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
