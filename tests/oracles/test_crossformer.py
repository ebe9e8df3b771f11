"""CrossFormer's attention, pixel by pixel and head by head, its bias network run anew for every pair."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.crossformer import CrossFormer


def axis_group(x, size, group, form):
    """Places that x sees along one axis, and where in the group they lie."""
    if size <= group:
        return {y: y for y in range(size)}
    if form == "short":
        return {y: y % group for y in range(size) if y // group == x // group}
    interval = -(-size // group)
    return {y: y // interval for y in range(size) if y % interval == x % interval}


def position_bias(weights, rows, columns):
    """Linear, then three times LayerNorm, ReLU, Linear."""
    token = (
        weights["position.0.weight"] @ torch.tensor([rows, columns], dtype=torch.float64) + weights["position.0.bias"]
    )
    for first in (1, 4, 7):
        token = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()
        token = token * weights[f"position.{first}.weight"] + weights[f"position.{first}.bias"]
        token = weights[f"position.{first + 2}.weight"] @ token.clamp(min=0) + weights[f"position.{first + 2}.bias"]
    return token


def oracle(layer, x):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    depth = dim // layer.heads
    out = torch.empty_like(x)
    for b in range(batch):
        places = [(i, j) for i in range(height) for j in range(width)]
        pixels = {at: weights["qkv.weight"] @ x[b, :, at[0], at[1]] + weights.get("qkv.bias", 0) for at in places}
        for i, j in places:
            rows = axis_group(i, height, layer.group, layer.form)
            columns = axis_group(j, width, layer.group, layer.form)
            seen = [(m, n) for m in rows for n in columns]
            biases = [position_bias(weights, rows[i] - rows[m], columns[j] - columns[n]) for m, n in seen]
            heads = []
            for h in range(layer.heads):
                q, k, v = (slice(part * dim + h * depth, part * dim + (h + 1) * depth) for part in range(3))
                scores = torch.stack(
                    [
                        pixels[i, j][q] @ pixels[at][k] / depth**0.5 + bias[h]
                        for at, bias in zip(seen, biases, strict=True)
                    ]
                )
                heads.append(torch.softmax(scores, 0) @ torch.stack([pixels[at][v] for at in seen]))
            out[b, :, i, j] = weights["projection.weight"] @ torch.cat(heads) + weights["projection.bias"]
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = CrossFormer(**{"dim": 4, "heads": 2, "bias_dim": 3} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((4, 6), {"group": 2}),
        ((5, 4), {"group": 3, "qkv_bias": False}),
        ((4, 6), {"group": 2, "form": "long"}),
        ((5, 7), {"group": 3, "form": "long", "bias_dim": 5}),
        ((2, 5), {"group": 3, "form": "long"}),
    ],
)
def test_both_distances_equal_the_paper(shape, settings):
    layer = build(**settings)
    x = torch.randn(1, 4, *shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("form", "seen"), [("short", [0, 1]), ("long", [0, 3])])
def test_a_change_reaches_its_group(form, seen):
    """Six pixels in groups of two: neighbours, or pixels three apart."""
    layer = build(group=2, form=form)
    x = torch.randn(1, 4, 1, 6, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0] += 1
    assert (layer(x) != layer(changed)).any(1)[0, 0].nonzero().flatten().tolist() == seen


def test_the_bias_network_is_a_sixteenth_as_wide_by_default():
    assert CrossFormer(64).position[0].out_features == 4
    assert CrossFormer(8).position[0].out_features == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1 channel"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"group": 0}, "group=0: expected at least 1 pixel"),
        ({"form": "grid"}, "form='grid': expected 'short' or 'long'"),
        ({"bias_dim": 0}, "bias_dim=0: expected at least 1, or None"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CrossFormer(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
