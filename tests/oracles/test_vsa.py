"""Varied-size window attention, query by query: where each head of a window looks, and the four pixels there."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.where.vsa import VSA


def bilinear(pixels, y, x, zero):
    """Value at (y, x) among pixels at whole places; 0 beyond them."""
    top, left = math.floor(y.item()), math.floor(x.item())
    value = zero
    for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, right in ((left, 1 - (x - left)), (left + 1, x - left)):
            value = value + down * right * pixels.get((row, column), zero)
    return value


def oracle(layer, x):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    depth, window = dim // layer.heads, layer.window
    high, wide = min(window, height), min(window, width)
    down, right = -(-height // high), -(-width // wide)  # windows
    table = weights["table"].view(2 * window - 1, 2 * window - 1, layer.heads)
    out = torch.empty_like(x)
    zero = x.new_zeros(dim)
    for b in range(batch):
        pixels = {(i, j): x[b, :, i, j] for i in range(height) for j in range(width)}
        qkv = {at: weights["qkv.weight"] @ token + weights.get("qkv.bias", 0) for at, token in pixels.items()}
        keys, values = ({at: both[part * dim : (part + 1) * dim] for at, both in qkv.items()} for part in (1, 2))
        for i in range(height):
            for j in range(width):
                top, left = i // high * high, j // wide * wide
                places = [(m, n) for m in range(top, top + high) for n in range(left, left + wide)]
                mean = sum(pixels.get(at, zero) for at in places) / len(places)
                mean = torch.where(mean > 0, mean, 0.01 * mean)
                offset = weights["offset.weight"] @ mean + weights["offset.bias"]
                scale = weights["scale.weight"] @ mean + weights["scale.bias"]
                heads = []
                for h in range(layer.heads):
                    mine = slice(h * depth, (h + 1) * depth)
                    (ox, oy), (sx, sy) = offset[2 * h : 2 * h + 2], scale[2 * h : 2 * h + 2]
                    scores, seen = [], []
                    for m, n in places:
                        y0, x0 = top + (high - 1) / 2, left + (wide - 1) / 2
                        y = y0 + (1 + sy) * (m - y0) + oy * (down * high - 1) / 2 / (height // high)
                        z = x0 + (1 + sx) * (n - x0) + ox * (right * wide - 1) / 2 / (width // wide)
                        key, value = (bilinear(part, y, z, zero)[mine] for part in (keys, values))
                        bias = table[i - m + window - 1, j - n + window - 1, h]
                        scores.append(qkv[i, j][mine] @ key / depth**0.5 + bias)
                        seen.append(value)
                    heads.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(seen))
                out[b, :, i, j] = weights["projection.weight"] @ torch.cat(heads) + weights["projection.bias"]
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = VSA(**{"dim": 4, "heads": 2} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((6, 6), {"window": 3}),
        ((4, 6), {"window": 2, "qkv_bias": False}),
        ((5, 7), {"window": 3}),
        ((2, 7), {"window": 4}),
        ((3, 1), {"window": 4}),
    ],
)
def test_varied_size_windows_equal_the_paper(shape, settings):
    layer = build(**settings)
    x = torch.randn(1, 4, *shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8)


def fixed(layer, offset, scale):
    """The layer with the same window for all heads and places, relative to each default one: (x, y) pairs."""
    with torch.no_grad():
        for part, value in ((layer.offset, offset), (layer.scale, scale)):
            part.weight.zero_()
            part.bias.copy_(torch.tensor(value, dtype=torch.float64).repeat(layer.heads))
    return layer


def test_the_default_window_is_swin():
    """Without scale and offset every window sees itself."""
    layer = fixed(build(window=2), (0, 0), (0, 0))
    x = torch.randn(1, 4, 4, 6, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0, 0] += 1
    moved = (layer(x) != layer(changed)).any(1)[0]
    assert moved[:2, :2].all()
    assert moved.sum() == 4


def test_an_offset_looks_into_the_next_window():
    """Of 1 x 6 pixels in windows of two, an offset of 1 is 5 / 2 / 3 of a pixel; here two pixels to the right."""
    layer = fixed(build(window=2), (2 / (5 / 2 / 3), 0), (0, 0))
    x = torch.randn(1, 4, 1, 6, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0, 2] += 1
    moved = ((layer(x) - layer(changed)).abs() > 1e-9).any(1)[0, 0]
    assert moved.tolist() == [True, True, True, False, False, False]  # 2 itself asks otherwise


def test_a_scale_of_minus_one_looks_at_the_centre():
    """All keys and values are those of one place, so that all queries of a window get the same."""
    layer = fixed(build(window=3), (0, 0), (-1, -1))
    out = layer(torch.randn(1, 4, 3, 6, dtype=torch.float64))
    torch.testing.assert_close(out[..., :3], out[..., 1:2, 1:2].expand(1, 4, 3, 3))


def test_half_precision_knows_its_pixels():
    """bf16 has no number between 256 and 258; places have."""
    layer = fixed(build(window=4), (0, 0), (0, 0))
    x = torch.randn(1, 4, 1, 400).bfloat16()
    exact = layer(x.double())
    error = (layer.bfloat16()(x).double() - exact).abs().max()
    assert error < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"window": 0}, "window=0: expected at least 1 pixel"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VSA(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
