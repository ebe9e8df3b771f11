"""Histogram self-attention against its definition, pixel by pixel."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from saccade.mechanisms.where.histogram import HistogramAttention


def attention(tokens_q, tokens_k, tokens_v, temperature):
    """Softmax with one more in the denominator, of unit queries and keys."""
    out = []
    for q in tokens_q:
        scores = torch.stack([temperature * (q / q.norm()) @ (k / k.norm()) for k in tokens_k])
        weights = scores.exp() / (scores.exp().sum() + 1)
        out.append(sum(w * v for w, v in zip(weights, tokens_v, strict=True)))
    return out


def bins_of(row, count, by_bins):
    """A sorted row, filled up with zeros, as a list of bins."""
    size = -(-len(row) // count)
    row = torch.cat([row, row.new_zeros(count * size - len(row))])
    return [row[n * size : (n + 1) * size] if by_bins else row[n::count] for n in range(count)]


def from_bins(bins, pixels, by_bins):
    return (torch.cat(bins) if by_bins else torch.stack(bins, 1).flatten())[:pixels]


def oracle(layer, x):
    """`[C, Y, X]`."""
    weights, half = dict(layer.named_parameters()), layer.dim // 2
    first = x[:half].clone()
    by_row = first.argsort(1)
    first = first.gather(1, by_row)
    by_column = first.argsort(2)
    first = first.gather(2, by_column)
    mixed = conv2d(torch.cat([first, x[half:]])[None], weights["qkv.weight"], weights.get("qkv.bias"))
    channels = mixed.shape[1]
    mixed = conv2d(mixed, weights["around.weight"], weights.get("around.bias"), padding=1, groups=channels)[0]
    q1, k1, q2, k2, v = mixed.flatten(1).split(layer.dim)
    order = v.argsort(1)
    q1, k1, q2, k2, v = (part.gather(1, order) for part in (q1, k1, q2, k2, v))
    pixels, width = v.shape[1], layer.dim // layer.heads
    product = torch.ones_like(v)
    for q, k, by_bins in ((q1, k1, True), (q2, k2, False)):
        out = torch.zeros_like(v)
        for h in range(layer.heads):
            rows = range(h * width, (h + 1) * width)
            tokens = [[b for c in rows for b in bins_of(part[c], layer.bins, by_bins)] for part in (q, k, v)]
            found = attention(*tokens, weights["temperature"][h])
            for number, c in enumerate(rows):
                mine = found[number * layer.bins : (number + 1) * layer.bins]
                out[c] = from_bins(mine, pixels, by_bins)
        product = product * out
    back = torch.zeros_like(product)
    for c in range(layer.dim):
        for place, pixel in enumerate(order[c].tolist()):
            back[c, pixel] = product[c, place]
    out = conv2d(back.reshape(1, *x.shape), weights["projection.weight"], weights.get("projection.bias"))[0]
    sorted_part, unsorted = out[:half], torch.zeros_like(out[:half])
    for c, y, z in torch.cartesian_prod(*(torch.arange(n) for n in first.shape)).tolist():
        column = by_column[c, y, z]
        unsorted[c, by_row[c, y, column], column] = sorted_part[c, y, z]
    return torch.cat([unsorted, out[half:]])


def build(**settings):
    torch.manual_seed(0)
    layer = HistogramAttention(**{"dim": 4, "heads": 2} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((4, 3), {}),
        ((5, 3), {"bins": 4}),  # 15 pixels, filled up to 16
        ((3, 5), {"dim": 6, "heads": 3, "bins": 2, "bias": True}),
        ((1, 7), {"heads": 1, "bins": 1}),
        ((2, 2), {"heads": 1, "bins": 4}),
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


def test_pixels_of_like_intensity_share_a_bin_wherever_they_are():
    """Two bins over 8 pixels: the four darkest and the four brightest, or every other one in their order."""
    row = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7.0])
    assert [b.tolist() for b in bins_of(row, 2, by_bins=True)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [b.tolist() for b in bins_of(row, 2, by_bins=False)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    layer = HistogramAttention(2, 1, bins=2).double()
    q = torch.tensor([[[1.0, 1, 1, 1, 0, 0, 0, 1], [0] * 8]], dtype=torch.float64)
    v = torch.tensor([[[0.0, 1, 2, 3, 4, 5, 6, 7], [0] * 8]], dtype=torch.float64)
    out = layer._attend(q, q, v, by_bins=True)[0, 0]
    e, half = torch.tensor(1.0).exp().item(), torch.tensor(0.5).exp().item()  # scores 1, 1/2, 0, 0
    expected = [(e * v[0, 0, n] + half * v[0, 0, n + 4]) / (e + half + 3) for n in range(4)]
    torch.testing.assert_close(out[:4], torch.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 3, "heads": 1}, "dim=3: expected an even number"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"bins": 0}, "bins=0: expected at least 1 bin, or None"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        HistogramAttention(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
