"""NSA against equations 5 to 12 of the paper, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from saccade.mechanisms.base import Position
from saccade.mechanisms.where.nsa import NSA


def softmax_of(q: Tensor, keys: list[Tensor]) -> list[float]:
    weights = [math.exp(float(q @ key) / math.sqrt(len(q))) for key in keys]
    return [w / sum(weights) for w in weights]


def mean_by(weights: list[float], values: list[Tensor], like: Tensor) -> Tensor:
    return sum((w * value for w, value in zip(weights, values, strict=True)), torch.zeros_like(like))


def compress(module: nn.Module, window: Tensor) -> Tensor:
    return module.map.weight @ (window + module.places).flatten()


def oracle(layer: NSA, x: Tensor) -> Tensor:
    """One sequence `[N, C]`."""
    tokens, heads, groups = len(x), layer.heads, layer.groups
    share = heads // groups
    q = layer.query(x).view(tokens, heads, -1)
    k = layer.keys(x).view(tokens, 3, groups, -1)
    v = layer.values(x).view(tokens, 3, groups, -1)
    gates = layer.gate(x).sigmoid().view(tokens, heads, 3)
    out = torch.zeros_like(q)
    for g in range(groups):
        starts = range(0, tokens - layer.kernel + 1, layer.stride)
        keys = [compress(layer.compress_key, k[s : s + layer.kernel, 0, g]) for s in starts]
        values = [compress(layer.compress_value, v[s : s + layer.kernel, 0, g]) for s in starts]
        for i in range(tokens):
            seen = [w for w, s in enumerate(starts) if s + layer.kernel - 1 <= i]
            totals = dict.fromkeys(range(len(starts)), 0.0)
            mine = range(g * share, (g + 1) * share)
            for h in mine:
                weights = softmax_of(q[i, h], [keys[w] for w in seen])
                out[i, h] += gates[i, h, 0] * mean_by(weights, [values[w] for w in seen], out[i, h])
                for w, weight in zip(seen, weights, strict=True):
                    totals[w] += weight
            chosen = selected(layer, totals, list(starts), i)
            picked = [j for j in range(i + 1) if j // layer.block in chosen]
            near = [j for j in range(i + 1) if i - j < layer.window]
            for h in mine:
                for branch, places in ((1, picked), (2, near)):
                    weights = softmax_of(q[i, h], [k[j, branch, g] for j in places])
                    out[i, h] += gates[i, h, branch] * mean_by(weights, [v[j, branch, g] for j in places], out[i, h])
    return layer.projection(out.flatten(1))


def selected(layer: NSA, totals: dict[int, float], starts: list[int], place: int) -> set[int]:
    """The first and last blocks, and the best of the rest by strides shared with windows."""
    own = place // layer.block
    always = {c for c in range(own + 1) if c < layer.init_blocks or c > own - layer.local_blocks}
    scores = {}
    for c in sorted(set(range(own + 1)) - always):
        inside = range(c * layer.block // layer.stride, (c + 1) * layer.block // layer.stride)
        scores[c] = sum(
            totals[w] * len(set(inside) & set(range(start // layer.stride, (start + layer.kernel) // layer.stride)))
            for w, start in enumerate(starts)
        )
    return always | set(sorted(scores, key=lambda c: -scores[c])[: layer.topk - len(always)])


def build(**settings: int) -> NSA:
    torch.manual_seed(0)
    layer = NSA(**settings).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return layer


@pytest.mark.parametrize("tokens", [1, 3, 27, 32])
@pytest.mark.parametrize(
    "settings",
    [
        {"dim": 8, "heads": 4, "kv_heads": 2, "kernel": 4, "stride": 2, "block": 4, "topk": 4, "window": 5},
        {"dim": 8, "heads": 2, "kernel": 2, "stride": 2, "block": 4, "topk": 3, "window": 3},
        {"dim": 6, "heads": 2, "kv_heads": 1, "head_dim": 4, "kernel": 6, "stride": 2, "block": 4, "topk": 4},
        {"dim": 8, "heads": 2, "kernel": 3, "stride": 3, "block": 3, "topk": 5, "init_blocks": 0, "window": 1},
    ],
    ids=str,
)  # fmt: skip
def test_paper_form(settings: dict[str, int], tokens: int) -> None:
    layer = build(**settings)
    x = 2 * torch.randn(2, tokens, settings["dim"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([oracle(layer, one) for one in x])
        torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=0)


def test_known_by_hand() -> None:
    """One head of one channel whose scores are all 0 and whose gates are 1/2: every branch is a plain mean."""
    layer = NSA(dim=1, heads=1, kernel=2, stride=2, block=2, topk=2, init_blocks=1, local_blocks=1, window=2)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        layer.values.weight.fill_(1.0)
        layer.compress_value.map.weight.fill_(0.5)
        layer.projection.weight.fill_(1.0)
        out = layer(torch.tensor([2.0, 4.0, 6.0, 8.0, 10.0]).view(1, 5, 1))
    # Token 4: windows (2, 4) and (6, 8), blocks 0 and 2 with 2, 4 and 10, and the last two tokens 8 and 10.
    assert float(out[0, 4, 0]) == pytest.approx(0.5 * (5 + 16 / 3 + 9))
    assert float(out[0, 0, 0]) == pytest.approx(0.5 * (0 + 2 + 2))


def test_compression_begins_as_the_mean() -> None:
    layer = NSA(dim=8, heads=2, kernel=4, stride=2, block=4)
    with torch.no_grad():
        layer.compress_key.places.zero_()
        window = torch.randn(3, 4, 4)
        torch.testing.assert_close(layer.compress_key(window), window.mean(1))


def test_every_weight_is_trained() -> None:
    layer = build(dim=8, heads=4, kv_heads=2, kernel=4, stride=2, block=4, topk=4, window=5)
    layer(torch.randn(2, 30, 8, dtype=torch.float64)).square().sum().backward()
    assert all(float(weight.grad.abs().sum()) > 0 for weight in layer.parameters())


def test_positions_turn_queries_and_keys_of_every_branch() -> None:
    class Scale(Position):
        def encode(self, x: Tensor, positions: Tensor) -> Tensor:
            return x * (1 + positions.to(x)[:, None])

    plain = build(dim=8, heads=2, kernel=2, stride=2, block=4, topk=4, window=3)
    placed = NSA(dim=8, heads=2, kernel=2, stride=2, block=4, topk=4, window=3, positions=Scale()).double()
    placed.load_state_dict(plain.state_dict())
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(plain(x), placed(x))
        torch.testing.assert_close(plain(x)[:, :1], placed(x)[:, :1])


def test_wrong_channels() -> None:
    with pytest.raises(ValueError, match=r"x of shape \(2, 5, 7\): expected \[B, N, 8\]"):
        build(dim=8, heads=2)(torch.zeros(2, 5, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 0}, "heads=0: expected at least 1"),
        ({"kv_heads": 3}, "kv_heads=3: expected a divisor of heads=4"),
        ({"dim": 6}, "dim=6: expected a multiple of heads=4"),
        ({"head_dim": 0}, "head_dim=0: expected at least 1 channel"),
        ({"stride": 0}, "stride=0: expected at least 1 token"),
        ({"block": 40}, "block=40: expected a positive multiple of stride=16"),
        ({"kernel": 24}, "kernel=24: expected a multiple of stride=16 up to 80"),
        ({"topk": 2}, r"topk=2: expected at least init_blocks \+ local_blocks"),
        ({"init_blocks": -1}, "init_blocks=-1: expected at least 0 blocks"),
        ({"local_blocks": 0}, "local_blocks=0: expected at least 1 block"),
        ({"window": 0}, "window=0: expected at least 1 token"),
    ],
)
def test_bad_setting(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NSA(**{"dim": 16, "heads": 4, **settings})
