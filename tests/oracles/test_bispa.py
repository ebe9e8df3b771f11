"""BiSPA against plus-shaped attention on the full table of spans."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.bispa import BiSPA


def rotate(x, place):
    """RoPE of one vector."""
    out = torch.empty_like(x)
    for m in range(len(x) // 2):
        angle = torch.tensor(place / 10000 ** (2 * m / len(x)), dtype=x.dtype)
        out[2 * m] = x[2 * m] * angle.cos() - x[2 * m + 1] * angle.sin()
        out[2 * m + 1] = x[2 * m + 1] * angle.cos() + x[2 * m] * angle.sin()
    return out


def line_attention(x, places, projection):
    """Self-attention of the spans on one line of the table, at these places along it."""
    q, k, v = (x @ projection.weight.T + projection.bias).chunk(3, 1)
    q, k = (torch.stack([rotate(row, place) for row, place in zip(part, places, strict=True)]) for part in (q, k))
    return torch.softmax(q @ k.T / x.shape[1] ** 0.5, 1) @ v


def oracle(layer, x):
    """`[C, band, N]`, through the table `[N, N, C]` of all spans."""
    window, length = layer.window, x.shape[2]
    near = {(i, j) for i in range(length) for j in range(length) if abs(i - j) <= window}
    table = {(i, j): x[:, j - i + window, i] + layer.triangle.weight[int(j >= i)] for i, j in near}
    across, down = {}, {}
    for n in range(length):
        row, column = [s for s in sorted(near) if s[0] == n], [s for s in sorted(near) if s[1] == n]
        for spans, axis, projection, found in ((row, 1, layer.rows, across), (column, 0, layer.columns, down)):
            out = line_attention(torch.stack([table[s] for s in spans]), [s[axis] for s in spans], projection)
            found.update(zip(spans, out, strict=True))
    out = torch.zeros_like(x)
    for i, j in near:
        both = torch.cat([across[i, j], down[(j, i) if layer.mirrored else (i, j)]])
        out[:, j - i + window, i] = layer.dense.weight @ both + layer.dense.bias
    return out


def build(**settings):
    torch.manual_seed(0)
    layer = BiSPA(**{"dim": 4, "window": 2} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("length", "window", "dim"), [(7, 2, 4), (5, 4, 2), (3, 5, 6), (1, 2, 4), (6, 0, 4)])
def test_equals_the_plus_on_the_whole_table(length, window, dim, mirrored):
    layer = build(dim=dim, window=window, mirrored=mirrored)
    x = torch.randn(2, dim, 2 * window + 1, length, dtype=torch.float64, requires_grad=True)
    out, wanted = layer(x), torch.stack([oracle(layer, item) for item in x])
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(out)
    leaves = [x, *layer.parameters()]
    mine = torch.autograd.grad((out * weight).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad((wanted * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_change_reaches_its_row_and_column(mirrored):
    """Seven tokens, spans of up to 2 apart: span (3, 4) is seen from (3, 1 .. 5) and (2 .. 6, 4)."""
    layer = build(mirrored=mirrored)
    x = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    changed = x.clone()
    changed[..., 4 - 3 + 2, 3] += 1
    moved = (layer(x) != layer(changed)).any(1)[0]
    spans = {(i, i + o - 2) for o, i in moved.nonzero().tolist()}
    row, column = {(3, j) for j in range(1, 6)}, {(i, 4) for i in range(2, 7)}
    assert spans == row | ({(j, i) for i, j in column} if mirrored else column)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"dim": 3}, "dim=3: expected an even number"), ({"window": -1}, "window=-1: expected at least 0")],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        BiSPA(**{"dim": 4, "window": 2} | settings)


def test_refuses_other_bands():
    with pytest.raises(ValueError, match=r"x of shape \(1, 4, 3, 7\): expected spans \[B, 4, 5, N\]"):
        build()(torch.zeros(1, 4, 3, 7, dtype=torch.float64))
