"""CSWin's layer, pixel by pixel and head by head, with LePE as a sum over the nine taps."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.cswin_attention import CSWinAttention


def stripe_of(place, size, stripe):
    """Number of the stripe that a place lies in; what is missing at the ends is shared, the smaller part first."""
    if size <= stripe:
        return 0
    return (place + -size % stripe // 2) // stripe


def oracle(layer, x):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    depth, half = dim // layer.heads, layer.heads // 2
    out = torch.empty_like(x)
    for b in range(batch):
        places = [(i, j) for i in range(height) for j in range(width)]
        pixels = {at: weights["qkv.weight"] @ x[b, :, at[0], at[1]] + weights.get("qkv.bias", 0) for at in places}
        for i, j in places:
            heads = []
            for h in range(layer.heads):
                axis = 1 if h < half else 0  # the axis that is cut: columns for vertical stripes
                mine = stripe_of((i, j)[axis], (height, width)[axis], layer.stripe)
                seen = [at for at in places if stripe_of(at[axis], (height, width)[axis], layer.stripe) == mine]
                q, k, v = (slice(part * dim + h * depth, part * dim + (h + 1) * depth) for part in range(3))
                scores = torch.stack([pixels[i, j][q] @ pixels[at][k] / depth**0.5 for at in seen])
                value = torch.softmax(scores, 0) @ torch.stack([pixels[at][v] for at in seen])
                taps = weights[f"lepe.{1 - axis}.weight"][:, 0]
                channels = slice((h % half) * depth, (h % half + 1) * depth)
                value = value + weights[f"lepe.{1 - axis}.bias"][channels]
                for a in range(3):
                    for c in range(3):
                        at = (i + a - 1, j + c - 1)
                        if at in seen:
                            value = value + taps[channels, a, c] * pixels[at][v]
                heads.append(value)
            out[b, :, i, j] = weights["projection.weight"] @ torch.cat(heads) + weights["projection.bias"]
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = CSWinAttention(**{"dim": 8, "heads": 4} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((4, 4), {"stripe": 1}),
        ((4, 6), {"stripe": 2, "heads": 2}),
        ((5, 7), {"stripe": 3, "qkv_bias": False}),
        ((4, 5), {"stripe": 7}),
        ((1, 7), {"stripe": 4}),
    ],
)
def test_cross_shaped_attention_equals_the_paper(size, settings):
    layer = build(**settings)
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_a_change_reaches_its_row_and_its_column():
    """Stripes of one pixel: exactly the cross through the changed pixel moves."""
    layer = build(stripe=1)
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    changed = x.clone()
    changed[..., 1, 3] += 1
    moved = (layer(x) != layer(changed)).any(1)[0]
    cross = torch.zeros(5, 5, dtype=torch.bool)
    cross[1], cross[:, 3] = True, True
    assert torch.equal(moved, cross)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 1}, "heads=1: expected an even divisor of dim=8"),
        ({"heads": 6}, "heads=6: expected an even divisor of dim=8"),
        ({"dim": 0}, "dim=0: expected at least 2 channels"),
        ({"stripe": 0}, "stripe=0: expected at least 1 pixel"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CSWinAttention(**{"dim": 8, "heads": 4} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 8, 5\): expected a feature map \[B, 8, height, width\]"):
        build()(torch.zeros(1, 8, 5, dtype=torch.float64))
