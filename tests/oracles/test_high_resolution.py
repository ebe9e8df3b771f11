"""FlexAttention for high-resolution models against its definition, token by token."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.where.high_resolution import HighResolutionAttention


def region_range(number, size, regions):
    """Places of one of `regions` parts of an axis, which may overlap: adaptive pooling."""
    return range(number * size // regions, math.ceil((number + 1) * size / regions))


def oracle_chosen(layer, row):
    """Fine tokens chosen by a map over the coarse image, a list of numbers."""
    (height, width), low, high = layer.grid, min(row), max(row)
    marked = [high > low and (value - low) / (high - low) > layer.threshold for value in row]
    fine = []
    for y in range(height * layer.zoom):
        for x in range(width * layer.zoom):
            a, b = y * layer.regions // (height * layer.zoom), x * layer.regions // (width * layer.zoom)
            rows, columns = region_range(a, height, layer.regions), region_range(b, width, layer.regions)
            if any(marked[i * width + j] for i in rows for j in columns):
                fine.append(y * width * layer.zoom + x)
    return fine


def linear(x, weights, name):
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def oracle(layer, tokens, fine, maps):
    """`[B, N, C]`, and the next map `[B, T, cells]`."""
    weights, dim, depth = dict(layer.named_parameters()), layer.dim, layer.dim // layer.heads
    cells = layer.grid[0] * layer.grid[1]
    out, following = torch.zeros_like(tokens), torch.zeros_like(maps)
    for b in range(len(tokens)):
        qkv, extra = linear(tokens[b], weights, "qkv"), linear(fine[b], weights, "fine_key_value")
        for i in range(len(qkv)):
            text = i - (len(qkv) - maps.shape[1])
            chosen = oracle_chosen(layer, maps[b, text].tolist()) if text >= 0 else []
            for h in range(layer.heads):
                part = slice(h * depth, (h + 1) * depth)
                q, k, v = (qkv[:, n * dim : (n + 1) * dim][:, part] for n in range(3))
                keys = torch.cat([k[: i + 1], extra[chosen][:, :dim][:, part]])
                values = torch.cat([v[: i + 1], extra[chosen][:, dim:][:, part]])
                attention = torch.softmax(keys @ q[i] / depth**0.5, 0)
                out[b, i, part] = attention @ values
                if text >= 0:  # the authors' map is of a softmax that fine tokens have no part in
                    plain = torch.softmax(k[: i + 1] @ q[i] / depth**0.5, 0)
                    following[b, text] += plain[layer.before : layer.before + cells]
    return linear(out, weights, "projection"), following


def build(**settings):
    torch.manual_seed(0)
    layer = HighResolutionAttention(**{"dim": 4, "heads": 2, "grid": (3, 4), "zoom": 2, "regions": 3} | settings)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


def inputs(layer, texts=3, after=4, batch=2):
    cells = layer.grid[0] * layer.grid[1]
    shapes = ((batch, layer.before + cells + after, layer.dim), (batch, cells * layer.zoom**2, layer.dim))
    tokens, fine = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return tokens, fine, torch.randn(batch, texts, cells, dtype=torch.float64).mul(2).softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"before": 2, "bias": True, "threshold": 0.6},
        {"grid": (4, 5), "regions": 3, "zoom": 3},  # regions overlap
        {"grid": (2, 2), "regions": 3, "zoom": 1, "heads": 1},  # and are smaller than a token
        {"threshold": 1.0},  # nothing is chosen
        {"threshold": 0.0, "regions": 1},  # everything is
    ],
)
def test_equals_the_paper(settings):
    layer = build(**settings)
    tokens, fine, maps = inputs(layer)
    tokens.requires_grad_()
    fine.requires_grad_()
    got, wanted = layer.with_map(tokens, fine, maps), oracle(layer, tokens, fine, maps)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    leaves = [tokens, fine, *layer.parameters()]
    weights = [torch.randn_like(x) for x in got]
    pairs = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(outs, weights, strict=True)), leaves, allow_unused=True)
        for outs in (got, wanted)
    ]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-8, atol=1e-9)


def test_a_look_at_a_corner_fetches_its_fine_tokens():
    """A map on the first of 2 x 2 places: of 4 x 4 fine tokens the 2 x 2 in that corner."""
    layer = build(grid=(2, 2), regions=2)
    chosen = layer.chosen(torch.tensor([[[1.0, 0, 0.1, 0.2]]]))
    assert chosen[0, 0].view(4, 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]


def test_layers_hand_the_map_on():
    layer = build()
    tokens, fine, maps = inputs(layer, texts=4, after=4)
    _, following = layer.with_map(tokens, fine, maps)
    out, _ = layer.with_map(tokens, fine, following)
    torch.testing.assert_close(out, oracle(layer, tokens, fine, following)[0], rtol=1e-10, atol=1e-10)
    assert bool((following.sum(-1) < layer.heads).all())  # the rest of the weight is on text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0, "heads": 1}, "dim=0: expected at least 1"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"grid": (0, 4)}, r"grid=\(0, 4\): expected at least 1 token"),
        ({"zoom": 0}, "zoom=0: expected at least 1"),
        ({"before": -1}, "before=-1: expected at least 0"),
        ({"threshold": 1.5}, r"threshold=1\.5: expected a share"),
        ({"regions": 0}, "regions=0: expected at least 1"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, f, m: (t[..., :3], f, m), r"tokens of shape \(2, 16, 3\): expected \[B, N, 4\]"),
        (lambda t, f, m: (t, f[:, :40], m), r"fine of shape \(2, 40, 4\): expected \(2, 48, 4\)"),
        (lambda t, f, m: (t, f, m[..., :5]), r"attention_map of shape \(2, 3, 5\): expected \[2, T, 12\]"),
        (lambda t, f, m: (t[:, :14], f, m), r"attention_map for 3 tokens: expected 1 \.\. 2 after the image"),
    ],
)
def test_refuses_shapes(change, message):
    layer = build()
    with pytest.raises(ValueError, match=message):
        layer(*change(*inputs(layer)))
