"""Twins' two attentions, pixel by pixel and head by head."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.twins import Twins


def summaries(weights, x, size):
    """LayerNorm of the strided convolution of one map `[C, Y, X]`, as a list of `[C]`."""
    if "reduce.weight" not in weights:
        return list(x.flatten(1).T)
    found = []
    for i in range(x.shape[1] // size):
        for j in range(x.shape[2] // size):
            patch = x[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
            token = (weights["reduce.weight"] * patch).sum((1, 2, 3)) + weights["reduce.bias"]
            token = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()
            found.append(token * weights["norm.weight"] + weights["norm.bias"])
    return found


def oracle(layer, x):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    depth, size = dim // layer.heads, layer.size
    out = torch.empty_like(x)
    for b in range(batch):
        whole = summaries(weights, x[b], size) if layer.form == "global" else []
        for i in range(height):
            for j in range(width):
                top, left = i // size * size, j // size * size
                seen = whole or list(x[b, :, top : top + size, left : left + size].flatten(1).T)
                query = weights["query.weight"] @ x[b, :, i, j] + weights.get("query.bias", 0)
                pairs = [weights["key_value.weight"] @ token + weights.get("key_value.bias", 0) for token in seen]
                heads = []
                for h in range(layer.heads):
                    mine, values = slice(h * depth, (h + 1) * depth), slice(dim + h * depth, dim + (h + 1) * depth)
                    scores = torch.stack([query[mine] @ pair[mine] / depth**0.5 for pair in pairs])
                    heads.append(torch.softmax(scores, 0) @ torch.stack([pair[values] for pair in pairs]))
                out[b, :, i, j] = weights["projection.weight"] @ torch.cat(heads) + weights["projection.bias"]
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = Twins(**{"dim": 4, "heads": 2} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((4, 6), {"size": 2}),
        ((5, 7), {"size": 3, "qkv_bias": False}),
        ((2, 3), {"size": 4}),
        ((4, 6), {"size": 2, "form": "global"}),
        ((5, 7), {"size": 3, "form": "global", "qkv_bias": False}),
        ((3, 4), {"size": 1, "form": "global"}),
    ],
)
def test_both_attentions_equal_the_paper(shape, settings):
    layer = build(**settings)
    x = torch.randn(2, 4, *shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_one_summary_gives_every_pixel_the_same():
    """A map of one window: all pixels attend to its only summary."""
    layer = build(size=4, form="global")
    out = layer(torch.randn(1, 4, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(out, out[..., :1, :1].expand_as(out))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1 channel"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"size": 0}, "size=0: expected at least 1 pixel"),
        ({"form": "grid"}, "form='grid': expected 'local' or 'global'"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Twins(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x of shape \(1, 4, 3, 9\): expected height and width of at least size=4"):
        build(size=4, form="global")(torch.zeros(1, 4, 3, 9, dtype=torch.float64))
