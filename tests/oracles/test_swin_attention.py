"""Window attention with relative position bias, pixel by pixel and head by head."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.swin_attention import SwinAttention


def axis_group(x, size, window, shift, form):
    """Places that x sees along one axis, and where in the window they lie."""
    if size <= window:
        return {y: y for y in range(size)}
    if form == "grid":
        step = -(-size // window)
        return {y: y // step for y in range(size) if y % step == x % step}
    return {y: (y - shift) % window for y in range(size) if (y - shift) // window == (x - shift) // window}


def oracle(layer, x):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    depth, side = dim // layer.heads, layer.window
    table = weights["table"].view(2 * side - 1, 2 * side - 1, layer.heads)
    out = torch.empty_like(x)
    for b in range(batch):
        pixels = {(i, j): x[b, :, i, j] @ weights["qkv.weight"].T for i in range(height) for j in range(width)}
        pixels = {at: value + weights.get("qkv.bias", 0) for at, value in pixels.items()}
        for i in range(height):
            for j in range(width):
                rows = axis_group(i, height, side, layer.shift, layer.form)
                columns = axis_group(j, width, side, layer.shift, layer.form)
                heads = []
                for h in range(layer.heads):
                    q, k, v = (slice(part * dim + h * depth, part * dim + (h + 1) * depth) for part in range(3))
                    seen = [(m, n) for m in rows for n in columns]
                    scores = torch.stack(
                        [
                            pixels[i, j][q] @ pixels[at][k] / depth**0.5
                            + table[rows[i] - rows[at[0]] + side - 1, columns[j] - columns[at[1]] + side - 1, h]
                            for at in seen
                        ]
                    )
                    heads.append(torch.softmax(scores, 0) @ torch.stack([pixels[at][v] for at in seen]))
                out[b, :, i, j] = torch.cat(heads) @ weights["projection.weight"].T + weights["projection.bias"]
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = SwinAttention(**{"dim": 4, "heads": 2} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((6, 6), {"window": 3}),
        ((6, 6), {"window": 3, "shift": 1}),
        ((5, 7), {"window": 3, "shift": 2, "qkv_bias": False}),
        ((2, 7), {"window": 4, "shift": 2}),
        ((6, 6), {"window": 3, "form": "grid"}),
        ((5, 7), {"window": 3, "form": "grid"}),
        ((3, 2), {"window": 4}),
    ],
)
def test_window_attention_equals_the_paper(size, settings):
    layer = build(**settings)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_a_change_stays_in_its_window():
    """A map of 4 x 8 with windows of 4 shifted by 2: the rows are one window, the columns 2, 4 and 2."""
    layer = build(window=4, shift=2)
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0, 0] += 1
    moved = (layer(x) != layer(changed)).any(1)[0]
    assert moved.all(0).tolist() == [True, True, False, False, False, False, False, False]
    assert torch.equal(moved.any(0), moved.all(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"window": 0}, "window=0: expected at least 1 pixel"),
        ({"form": "stripe"}, "form='stripe': expected 'block' or 'grid'"),
        ({"window": 4, "shift": 4}, "shift=4: expected at least 0 and less than window=4"),
        ({"window": 4, "shift": 2, "form": "grid"}, "shift=2: expected 0 with form='grid'"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SwinAttention(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
