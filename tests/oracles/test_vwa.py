"""Varying window attention, window by window, with the padding of the paper's figure laid out as a list of columns."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.vwa import VWA, context_places


def copy_shifted(size, window, ratio):
    """One axis with its padding: the numbers of its pixels, None for zeros."""
    pixels = list(range(size))
    context, keep = ratio * window, (ratio + 1) * window // 2
    missing = max(context - size, 0)
    wide = [None] * (missing // 2) + pixels + [None] * (missing - missing // 2)
    return wide[keep:context] + pixels + wide[len(wide) - context : len(wide) - keep]


def oracle(layer, x):
    weights = dict(layer.named_parameters())
    batch, dim, height, width = x.shape
    depth, side, ratio = dim // layer.heads, layer.window, layer.ratio
    high, wide = -(-height // side) * side, -(-width // side) * side
    whole = torch.cat([torch.cat([x, x.new_zeros(batch, dim, high - height, width)], 2)], 2)
    whole = torch.cat([whole, x.new_zeros(batch, dim, high, wide - width)], 3)
    rows, columns = copy_shifted(high, side, ratio), copy_shifted(wide, side, ratio)
    before = ratio // 2 - 1 if ratio % 2 == 0 else ratio // 2
    out = torch.empty_like(x)
    for b in range(batch):

        def embedded(i, j, b=b):
            if i is None or j is None:
                return x.new_zeros(dim // ratio**2)
            total = weights["embed.bias"].clone()
            for m in range(ratio):
                for n in range(ratio):
                    row, column = i - before + m, j - before + n
                    if 0 <= row < high and 0 <= column < wide:
                        total = total + weights["embed.weight"][:, :, m, n] @ whole[b, :, row, column]
            return total.clamp(min=0)

        for top in range(0, height, side):
            for left in range(0, width, side):
                tokens = []
                for i in range(side):
                    for j in range(side):
                        square = [
                            embedded(rows[top + i * ratio + m], columns[left + j * ratio + n])
                            for m in range(ratio)
                            for n in range(ratio)
                        ]
                        token = torch.cat(square)
                        tokens.append(weights["key_value.weight"] @ token + weights["key_value.bias"])
                for i in range(top, min(top + side, height)):
                    for j in range(left, min(left + side, width)):
                        q = weights["query.weight"] @ x[b, :, i, j] + weights["query.bias"]
                        heads = []
                        for h in range(layer.heads):
                            mine, values = (
                                slice(h * depth, h * depth + depth),
                                slice(dim + h * depth, dim + h * depth + depth),
                            )
                            scores = torch.stack([q[mine] @ token[mine] / depth**0.5 for token in tokens])
                            heads.append(torch.softmax(scores, 0) @ torch.stack([token[values] for token in tokens]))
                        mixed = weights["projection.weight"] @ torch.cat(heads) + weights["projection.bias"]
                        out[b, :, i, j] = mixed
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = VWA(**{"dim": 4, "heads": 2} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((4, 6), {"window": 2}),
        ((4, 6), {"window": 1}),
        ((5, 7), {"window": 3}),
        ((6, 9), {"window": 3, "ratio": 3, "dim": 9, "heads": 3}),
        ((2, 3), {"window": 2, "ratio": 4, "dim": 16}),
        ((2, 4), {"window": 2, "ratio": 1}),
    ],
)
def test_varying_windows_equal_the_paper(shape, settings):
    layer = build(**settings)
    x = torch.randn(1, layer.dim, *shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    out, wanted = layer(x), oracle(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_known_contexts():
    """Eight pixels, windows of two, contexts of four: those at the borders are moved inside, in cyclic order."""
    assert context_places(8, 2, 2).tolist() == [[3, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 4]]


@pytest.mark.parametrize(("size", "window", "ratio"), [(12, 2, 4), (12, 3, 2), (9, 3, 3), (4, 2, 4), (6, 3, 8)])
def test_contexts_are_cut_out_of_the_padded_axis(size, window, ratio):
    padded = [size if place is None else place for place in copy_shifted(size, window, ratio)]
    starts = range(0, size, window)
    assert context_places(size, window, ratio).tolist() == [padded[start : start + ratio * window] for start in starts]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0: expected at least 1 channel"),
        ({"heads": 3}, "heads=3: expected a divisor of dim=4"),
        ({"window": 0}, "window=0: expected at least 1 pixel"),
        ({"ratio": 3}, "ratio=3: expected at least 1, and its square a divisor of dim=4"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VWA(**{"dim": 4, "heads": 2} | settings)


def test_refuses_other_maps():
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\): expected a feature map \[B, 4, height, width\]"):
        build()(torch.zeros(1, 3, 5, 5, dtype=torch.float64))
