"""HaloNet's layer, query by query: its block, the halo, an embedding of the row offset and one of the column offset."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.halonet_attention import HaloNetAttention


def oracle(layer, x):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    depth, size, halo, stride = dim // layer.heads, layer.size, layer.halo, layer.stride
    out = torch.empty(batch, dim, -(-height // stride), -(-width // stride), dtype=x.dtype)
    middle = size + halo - 1  # the embedding of offset 0
    for b in range(batch):
        for i in range(0, height, stride):
            for j in range(0, width, stride):
                top, left = i // size * size, j // size * size
                rows = range(max(0, top - halo), min(height, top + size + halo))
                columns = range(max(0, left - halo), min(width, left + size + halo))
                query = weights["query.weight"] @ x[b, :, i, j]
                heads = []
                for h in range(layer.heads):
                    mine = slice(h * depth, (h + 1) * depth)
                    scores, values = [], []
                    for m in rows:
                        for n in columns:
                            key, value = (weights["key_value.weight"] @ x[b, :, m, n]).split(dim)
                            place = weights["rows"][m - i + middle] + weights["columns"][n - j + middle]
                            scores.append(query[mine] @ (key[mine] + place) / depth**0.5)
                            values.append(value[mine])
                    heads.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
                mixed = weights["projection.weight"] @ torch.cat(heads) + weights["projection.bias"]
                out[b, :, i // stride, j // stride] = mixed
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = HaloNetAttention(**{"dim": 4, "heads": 2} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((4, 4), {"size": 2, "halo": 1}),
        ((6, 4), {"size": 2, "halo": 3}),
        ((5, 7), {"size": 3, "halo": 2}),
        ((4, 6), {"size": 2, "halo": 1, "stride": 2}),
        ((5, 7), {"size": 4, "halo": 1, "stride": 2}),
        ((2, 3), {"size": 4, "halo": 0}),
    ],
)
def test_blocked_local_attention_equals_the_paper(shape, settings):
    layer = build(**settings)
    x = torch.randn(2, 4, *shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_a_change_reaches_the_blocks_whose_halo_holds_it():
    """Blocks of two and a halo of one: pixel 1 is in the block of 0 and 1, and in the halo of 2 and 3."""
    layer = build(size=2, halo=1)
    x = torch.randn(1, 4, 1, 8, dtype=torch.float64)
    changed = x.clone()
    changed[..., 1] += 1
    moved = (layer(x) != layer(changed)).any(1)[0, 0]
    assert moved.tolist() == [True, True, True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1 channel"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"size": 0}, "size=0: expected at least 1 pixel"),
        ({"halo": -1}, "halo=-1: expected at least 0 pixels"),
        ({"size": 4, "stride": 3}, "stride=3: expected a divisor of size=4"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        HaloNetAttention(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
