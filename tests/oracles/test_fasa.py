"""FaSA against its definition: query by query, with windows cut out place by place."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from saccade.mechanisms.where.fasa import FaSA, windows_of


def reflect(place, size):
    """A place beyond the border, seen in mirrors at both borders."""
    while size > 1 and not 0 <= place < size:
        place = -place if place < 0 else 2 * (size - 1) - place
    return place if size > 1 else 0


def cut_windows(x, window, dilation):
    """Windows of a map `[C, Y, X]` that stand side by side: a list of `[C, window, window]`."""
    span, windows = dilation * (window - 1) + 1, []
    for top in range(0, x.shape[1], span):
        for left in range(0, x.shape[2], span):
            rows = [reflect(top + i * dilation, x.shape[1]) for i in range(window)]
            columns = [reflect(left + j * dilation, x.shape[2]) for j in range(window)]
            windows.append(x[:, rows][:, :, columns])
    return windows


def fused(windows, runs):
    """One window of `[C, window, window]` from several."""
    if not runs:
        return sum(windows) / len(windows)
    channels = len(windows[0])
    row = torch.cat(windows)  # channels of the first window, then of the second
    return torch.stack([row[n * len(windows) : (n + 1) * len(windows)].mean(0) for n in range(channels)])


def depthwise(x, weight, bias):
    """3 x 3 convolution of each channel of `[C, Y, X]`, zeros beyond the border."""
    out = bias[:, None, None].expand_as(x).clone()
    for c, y, z in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        for i in range(3):
            for j in range(3):
                a, b = y + i - 1, z + j - 1
                if 0 <= a < x.shape[1] and 0 <= b < x.shape[2]:
                    out[c, y, z] += weight[c, 0, i, j] * x[c, a, b]
    return out


def linear(x, weights, name):
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def attention(q, k, v):
    return torch.softmax(q @ k.T / q.shape[1] ** 0.5, 1) @ v


def with_position(v, size, weights, name):
    """Values `[n, d]` of a map of the given size, with a depthwise convolution of themselves added."""
    grid = v.T.reshape(-1, *size)
    return v + depthwise(grid, weights[f"{name}.weight"], weights[f"{name}.bias"]).flatten(1).T


def oracle(layer, x):
    """`[C, Y, X]`."""
    weights = dict(layer.named_parameters())
    unit = layer.dim // (16 if layer.reduction > 1 else 8)
    first, step = (2 * unit, layer.reduction) if layer.reduction > 1 else (unit, 1)
    q = linear(x.flatten(1).T, weights, "query")

    rows, columns = x.shape[1] // step, x.shape[2] // step
    pooled = torch.zeros(first, rows, columns, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            patch = x[:first, i * step : (i + 1) * step, j * step : (j + 1) * step]
            pooled[:, i, j] = (weights["pool.weight"] * patch).sum((1, 2, 3)) + weights["pool.bias"]
    tokens = layer_norm(pooled.flatten(1).T, (first,), weights["norm.weight"], weights["norm.bias"])
    k, v = linear(tokens, weights, "pooled_key_value").split(first, 1)
    parts = [attention(q[:, :first], k, with_position(v, (rows, columns), weights, "pooled_position"))]

    local = depthwise(x[first:], weights["mix.0.weight"], weights["mix.0.bias"])
    mixed = weights["mix.1.weight"][:, :, 0, 0] @ local.flatten(1) + weights["mix.1.bias"][:, None]
    local = mixed.reshape(local.shape)
    dilations = (1, layer.reduction) if layer.reduction > 1 else (1,)
    depth = 7 * unit // layer.heads
    per_head = len(dilations) * depth  # a head's queries for all windows lie together
    for number, dilation in enumerate(dilations):
        mine = local[number * 7 * unit : (number + 1) * 7 * unit]
        keys, values = [], []
        for h in range(layer.heads):
            windows = cut_windows(mine[h * depth : (h + 1) * depth], layer.window, dilation)
            places = fused(windows, layer.runs).flatten(1).T
            both = linear(linear(places, weights, f"fuse.{number}"), weights, f"key_value.{number}")
            keys.append(both[:, :depth])
            values.append(both[:, depth:])
        size = (layer.window, layer.window)
        around = with_position(torch.cat(values, 1), size, weights, f"position.{number}").split(depth, 1)
        for h in range(layer.heads):
            start = first + h * per_head + number * depth
            parts.append(attention(q[:, start : start + depth], keys[h], around[h]))
    return linear(torch.cat(parts, 1), weights, "projection").T.reshape(x.shape)


def build(**settings):
    torch.manual_seed(0)
    layer = FaSA(**{"dim": 16, "heads": 1} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((4, 6), {"window": 2, "reduction": 2}),
        ((5, 7), {"window": 3, "reduction": 2, "heads": 7, "qkv_bias": True}),
        ((5, 7), {"window": 2, "reduction": 2, "heads": 7, "runs": True, "dim": 32}),
        ((3, 4), {"window": 2, "reduction": 3}),  # the dilated square is larger than the map
        ((5, 3), {"dim": 8, "window": 2, "reduction": 1}),
        ((1, 5), {"dim": 8, "window": 3, "reduction": 1, "qkv_bias": True}),
    ],
)
def test_equals_the_paper(size, settings):
    layer = build(**settings)
    x = torch.randn(2, layer.dim, *size, dtype=torch.float64, requires_grad=True)
    out, wanted = layer(x), torch.stack([oracle(layer, item) for item in x])
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(out)
    leaves = [x, *layer.parameters()]
    mine = torch.autograd.grad((out * weight).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad((wanted * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_known_window():
    """0 .. 5 in windows of 2: (0, 1), (2, 3), (4, 5), on average (2, 3); 2 apart: (0, 2), (3, 5): (1.5, 3.5)."""
    line = torch.arange(6.0).expand(1, 1, 1, 6)
    assert windows_of(line, 2, 1)[0, 0, :, :2].tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert windows_of(line, 2, 2)[0, 0].mean(0)[:2].tolist() == [1.5, 3.5]


def test_dim_is_shared_as_the_authors_do():
    layer = build(dim=64, heads=4, window=7, reduction=8)
    assert (layer.pooled, layer.depth, layer.dilations) == (8, 7, (1, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 24}, "dim=24: expected a multiple of 16"),
        ({"dim": 12, "reduction": 1}, "dim=12: expected a multiple of 8"),
        ({"heads": 2}, "heads=2: expected a divisor of a group's 7 channels"),
        ({"window": 0}, "window=0: expected at least 1 place"),
        ({"reduction": 0}, "reduction=0: expected at least 1 place"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FaSA(**{"dim": 16, "heads": 1} | settings)


def test_refuses_other_maps():
    layer = build(window=2, reduction=4)
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 16, height, width\]"):
        layer(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"height, width=\(5, 3\): expected at least reduction=4"):
        layer(torch.zeros(1, 16, 5, 3, dtype=torch.float64))
