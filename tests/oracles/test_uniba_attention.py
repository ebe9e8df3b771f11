"""Unidirectional block attention, pixel by pixel: the keys of four blocks in one list, each with its embedding."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.uniba_attention import UniBAAttention


def oracle(layer, x, step):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    depth, size = dim // layer.heads, layer.size
    rows, columns = -(-height // size), -(-width // size)
    out = torch.empty_like(x)

    def unit(token):
        if "norm.weight" not in weights:
            return token
        token = (token - token.mean()) / (token.var(correction=0) + 1e-6).sqrt()
        return token * weights["norm.weight"] + weights["norm.bias"]

    for b in range(batch):
        blocks = {(m, n): [] for m in range(rows) for n in range(columns)}
        for i in range(height):
            for j in range(width):
                qkv = weights["qkv.weight"] @ x[b, :, i, j] + weights.get("qkv.bias", 0)
                blocks[i // size, j // size].append((i, j, qkv.split(dim)))
        for (m, n), pixels in blocks.items():
            across, down = min(max(n + step, 0), columns - 1), min(max(m + step, 0), rows - 1)
            seen = [blocks[m, n], blocks[down, across], blocks[m, across], blocks[down, n]]
            for i, j, (query, _, _) in pixels:
                heads = []
                for h in range(layer.heads):
                    mine = slice(h * depth, (h + 1) * depth)
                    scores, values = [], []
                    for number, block in enumerate(seen):
                        for _, _, (_, key, value) in block:
                            told = unit(key[mine]) + weights["neighbours"][number, h, 0]
                            scores.append(unit(query[mine]) @ told / depth**0.5)
                            values.append(value[mine])
                    heads.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
                out[b, :, i, j] = weights["projection.weight"] @ torch.cat(heads) + weights["projection.bias"]
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = UniBAAttention(**{"dim": 4, "heads": 2, "size": 2} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((4, 6), {}),
        ((6, 4), {"direction": "rb", "qkv_bias": False}),
        ((5, 3), {"norm": False}),
        ((4, 5), {"size": 3, "direction": "rb"}),
        ((2, 3), {"size": 4}),
    ],
)
def test_block_attention_equals_the_paper(shape, settings):
    layer = build(**settings)
    x = torch.randn(1, 4, *shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x, 1 if settings.get("direction") == "rb" else -1)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("direction", ["lt", "rb"])
@pytest.mark.parametrize(("shape", "size"), [((6, 8), 2), ((7, 5), 3), ((9, 2), 3)])
def test_rows_of_blocks_are_the_whole(shape, size, direction):
    """Two layers, row after row, each keeping one row of blocks."""
    layers = [build(size=size, direction=direction) for _ in range(2)]
    x = torch.randn(2, 4, *shape, dtype=torch.float64)
    whole = layers[1](layers[0](x))
    strips = list(x.split(size, 2))
    kept, outs = [None, None], []
    for strip in strips if direction == "lt" else strips[::-1]:
        out = strip
        for number, layer in enumerate(layers):
            out, kept[number] = layer.row(out, kept[number])
        outs.append(out)
    joined = torch.cat(outs if direction == "lt" else outs[::-1], 2)
    torch.testing.assert_close(joined, whole, rtol=1e-11, atol=1e-11)


def test_a_change_reaches_the_blocks_behind_it():
    layer = build()
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    changed = x.clone()
    changed[..., 2, 4] += 1
    moved = (layer(x) != layer(changed)).any(1)[0]
    assert moved[2:6, 4:8].all()
    assert moved.sum() == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1 channel"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"size": 0}, "size=0: expected at least 1 pixel"),
        ({"direction": "up"}, "direction='up': expected 'lt' or 'rb'"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        UniBAAttention(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x of shape \(1, 4, 3, 6\): expected one row of blocks, height up to size=2"):
        build().row(torch.zeros(1, 4, 3, 6, dtype=torch.float64))
