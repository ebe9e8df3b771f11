"""Aggregated attention, pixel by pixel, with all its keys in one list."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.mechanisms.where.transnext import TransNeXt, pooled_offsets


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def cells(size, count):
    """First pixel and the one after the last of each cell of adaptive pooling."""
    return [(i * size // count, math.ceil((i + 1) * size / count)) for i in range(count)]


def oracle(layer, x):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    depth, reach = dim // layer.heads, layer.window // 2
    known = layer.trained_grid or (height, width)
    rows = cells(height, min(layer.pooled or max(height // layer.reduction, 1), height))
    columns = cells(width, min(layer.pooled or max(width // layer.reduction, 1), width))
    out = torch.empty_like(x)

    def linear(name, token):
        return weights[f"{name}.weight"] @ token + weights.get(f"{name}.bias", 0)

    def unit(token):
        return token / token.norm()

    def offset_bias(i, j, centre):
        d = [8 * (here - there) / max(size - 1, 1) for here, there, size in zip((i, j), centre, known, strict=True)]
        d = [math.copysign(math.log2(abs(value) + 1) / math.log2(8), value) for value in d]
        hidden = linear("offset_bias.0", torch.tensor(d, dtype=x.dtype)).clamp(min=0)
        return linear("offset_bias.2", hidden)

    for b in range(batch):
        pixels = {(i, j): x[b, :, i, j] for i in range(height) for j in range(width)}
        fine = {at: linear("key_value", token).split(dim) for at, token in pixels.items()}
        coarse = {}
        for top, bottom in rows:
            for left, right in columns:
                part = [gelu(linear("reduce", pixels[i, j])) for i in range(top, bottom) for j in range(left, right)]
                token = sum(part) / len(part)
                token = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()
                token = token * weights["norm.weight"] + weights["norm.bias"]
                coarse[(top + bottom - 1) / 2, (left + right - 1) / 2] = linear("key_value", token).split(dim)
        for (i, j), token in pixels.items():
            query, heads = linear("query", token), []
            places = [(i + m, j + n) for m in range(-reach, reach + 1) for n in range(-reach, reach + 1)]
            near = [(number, fine[at]) for number, at in enumerate(places) if at in fine]
            for h in range(layer.heads):
                mine = slice(h * depth, (h + 1) * depth)
                q = unit(query[mine])
                sharp = math.log(len(near) + len(coarse)) * torch.log1p(weights["temperature"][h, 0, 0].exp())
                asked = (q + weights["embedding"][h, 0]) * sharp
                scores = [asked @ unit(key[mine]) + weights["place_bias"][h, 0, number] for number, (key, _) in near]
                scores += [asked @ unit(key[mine]) + offset_bias(i, j, at)[h] for at, (key, _) in coarse.items()]
                values = [value[mine] for _, (_, value) in near] + [value[mine] for _, value in coarse.values()]
                mixed = torch.softmax(torch.stack(scores), 0) @ torch.stack(values)
                for number, (_, value) in near:
                    further = q @ weights["tokens"][h, :, number] + weights["token_bias"][h, 0, number]
                    mixed = mixed + further * value[mine]
                heads.append(mixed)
            out[b, :, i, j] = linear("projection", torch.cat(heads))
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = TransNeXt(**{"dim": 4, "heads": 2, "reduction": 2, "hidden": 3} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((4, 6), {}),
        ((5, 3), {"qkv_bias": False}),
        ((3, 4), {"window": 5, "trained_grid": (7, 9)}),
        ((5, 7), {"reduction": 3, "window": 1}),
        ((1, 3), {"reduction": 4}),
        ((2, 5), {"pooled": 3}),
    ],
)
def test_aggregated_attention_equals_the_paper(shape, settings):
    layer = build(**settings)
    x = torch.randn(1, 4, *shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8)


def test_every_pixel_sees_the_whole_map():
    """A change in one corner reaches all of the map, its own window more than the rest."""
    layer = build()
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0, 0] += 1
    moved = (layer(x) - layer(changed)).norm(dim=1)[0]
    assert (moved > 0).all()
    assert moved[:2, :2].min() > moved[3:, 4:].mean()


def test_the_first_temperature_is_that_of_the_paper():
    temperature = torch.nn.functional.softplus(TransNeXt(8, heads=2).temperature.double())
    torch.testing.assert_close(temperature, torch.full_like(temperature, 1 / 0.24), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("size", "pooled"), [(6, 3), (8, 2), (5, 2), (7, 3), (4, 4), (3, 1), (1, 1)])
def test_pooled_offsets_name_each_pair(size, pooled):
    offsets, index = pooled_offsets(size, pooled)
    centres = torch.tensor([(first + after - 1) / 2 for first, after in cells(size, pooled)], dtype=torch.float64)
    assert torch.equal(offsets[index], torch.arange(size)[:, None] - centres)
    assert len(offsets) <= 2 * size if size % pooled == 0 else 4 * size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1 channel"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"window": 4}, "window=4: expected an odd number of pixels"),
        ({"reduction": 0}, "reduction=0: expected at least 1 pixel"),
        ({"pooled": 0}, "pooled=0: expected None, or at least 1 key"),
        ({"trained_grid": (0, 3)}, r"trained_grid=\(0, 3\): expected None, or a height and a width"),
        ({"hidden": 0}, "hidden=0: expected at least 1 channel"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TransNeXt(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
