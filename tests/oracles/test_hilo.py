"""HiLo attention, pixel by pixel and head by head."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.hilo import HiLo


def one_head(query, keys, values):
    scores = torch.stack([query @ key for key in keys]) / len(query) ** 0.5
    return torch.softmax(scores, 0) @ torch.stack(values)


def oracle(layer, x):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    side, depth = layer.window, dim // (layer.low + layer.high)
    out = torch.empty_like(x)
    for b in range(batch):
        patches = {
            (i // side, j // side): x[b, :, i : i + side, j : j + side].flatten(1).T
            for i in range(0, height, side)
            for j in range(0, width, side)
        }
        for i in range(height):
            for j in range(width):
                pixel, found = x[b, :, i, j], []
                if layer.high:
                    matrix, bias = weights["high_qkv.weight"], weights.get("high_qkv.bias", 0)
                    q, _, _ = (matrix @ pixel + bias).chunk(3)
                    near = [(matrix @ token + bias).chunk(3) for token in patches[i // side, j // side]]
                    heads = [slice(h * depth, (h + 1) * depth) for h in range(layer.high)]
                    mixed = [one_head(q[at], [k[at] for _, k, _ in near], [v[at] for _, _, v in near]) for at in heads]
                    found.append(weights["high_projection.weight"] @ torch.cat(mixed) + weights["high_projection.bias"])
                if layer.low:
                    q = weights["low_query.weight"] @ pixel + weights.get("low_query.bias", 0)
                    matrix, bias = weights["low_key_value.weight"], weights.get("low_key_value.bias", 0)
                    far = [(matrix @ patch.mean(0) + bias).chunk(2) for patch in patches.values()]
                    heads = [slice(h * depth, (h + 1) * depth) for h in range(layer.low)]
                    mixed = [one_head(q[at], [k[at] for k, _ in far], [v[at] for _, v in far]) for at in heads]
                    found.append(weights["low_projection.weight"] @ torch.cat(mixed) + weights["low_projection.bias"])
                out[b, :, i, j] = torch.cat(found)
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = HiLo(**{"dim": 8, "heads": 4} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((4, 6), {"window": 2}),
        ((5, 7), {"window": 3, "alpha": 0.75, "qkv_bias": True}),
        ((4, 4), {"window": 2, "alpha": 0.0}),
        ((5, 4), {"window": 2, "alpha": 1.0}),
        ((3, 4), {"window": 1}),
        ((2, 3), {"window": 4, "alpha": 0.4}),
    ],
)
def test_hilo_equals_the_paper(shape, settings):
    layer = build(**settings)
    x = torch.randn(2, 8, *shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_low_frequencies_see_only_averages():
    """What adds to one pixel of a window and takes from its neighbour does not reach the low heads of other pixels."""
    layer = build(window=2)
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0, 0] += 1
    changed[..., 0, 1] -= 1
    moved = ((layer(x) - layer(changed)).abs() > 1e-12).flatten(2).any(2)[0]
    before, after = layer(x)[:, 4:, 2:], layer(changed)[:, 4:, 2:]
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert bool(moved[:4].all())


@pytest.mark.parametrize(("alpha", "low"), [(0.0, 0), (0.4, 1), (0.5, 2), (0.9, 3), (1.0, 4)])
def test_low_heads_are_rounded_down(alpha, low):
    layer = build(alpha=alpha)
    assert (layer.low, layer.high) == (low, 4 - low)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1 channel"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=8"),
        ({"window": 0}, "window=0: expected at least 1 pixel"),
        ({"alpha": 1.5}, r"alpha=1\.5: expected a fraction of the heads"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        HiLo(**{"dim": 8, "heads": 4} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 8, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
