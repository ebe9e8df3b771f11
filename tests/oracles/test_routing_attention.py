"""Routing attention against its rule, cluster by cluster, and the moving averages of its centroids."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where.routing_attention import RoutingAttention


def normed(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt()


def softmax_mean(q, keys, values, scale: float) -> torch.Tensor:
    weights = torch.stack([scale * (q @ k) for k in keys]).softmax(0)
    return sum(w * value for w, value in zip(weights, values, strict=True))


def oracle(layer: RoutingAttention, x: torch.Tensor) -> torch.Tensor:
    """One sequence `[N, C]`."""
    tokens, size = len(x), layer.dim // layer.heads
    q, k, v = (part.view(tokens, layer.heads, size) for part in layer.qkv(x).chunk(3, 1))
    out = torch.zeros(tokens, layer.heads, size, dtype=x.dtype)
    for h in range(layer.heads):
        if h < layer.local_heads:
            for i in range(tokens):
                seen = [j for j in range(tokens) if abs(i - j) < layer.local_window and (j <= i or not layer.causal)]
                out[i, h] = softmax_mean(q[i, h], [k[j, h] for j in seen], [v[j, h] for j in seen], size**-0.5)
            continue
        queries = [normed(q[i, h]) for i in range(tokens)]
        keys = queries if layer.shared else [normed(k[i, h]) for i in range(tokens)]
        found: list[list[torch.Tensor]] = [[] for _ in range(tokens)]
        for centroid in layer.centroids[h - layer.local_heads]:
            rows, columns = (
                sorted(sorted(range(tokens), key=lambda i: -float((items[i] @ centroid).detach()))[: layer.window])  # noqa: B023
                for items in (queries, keys)
            )
            for i in rows:
                seen = [j for j in columns if j <= i or not layer.causal]
                found[i].append(softmax_mean(queries[i], [keys[j] for j in seen], [v[j, h] for j in seen], layer.scale))
        for i in range(tokens):
            if found[i]:
                out[i, h] = sum(found[i]) / len(found[i])
    return layer.projection(out.flatten(1))


def build(**settings: object) -> RoutingAttention:
    torch.manual_seed(0)
    return RoutingAttention(**{"dim": 8, "heads": 2, "local_heads": 0, "clusters": 3, "window": 5, **settings}).double()


@pytest.mark.parametrize("tokens", [1, 4, 23])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shared": False},
        {"causal": True, "scale": 0.3},
        {"heads": 4, "local_heads": 2, "local_window": 3},
        {"heads": 4, "local_heads": 2, "local_window": 3, "causal": True, "window": 30},
        {"local_heads": 2, "local_window": 4},
    ],
    ids=str,
)
def test_output_and_gradients_are_those_of_the_rule(settings: dict, tokens: int) -> None:
    layer = build(**settings).eval()
    x = torch.randn(2, tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out, wanted = layer(x), torch.stack([oracle(layer, row) for row in x])
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
    leaves = [x, *layer.parameters()]
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for got, gradient in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (out, wanted)), strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shared", [True, False])
def test_centroids_follow_their_tokens(shared: bool) -> None:
    layer = build(shared=shared, decay=0.75).train()
    x = torch.randn(3, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before, sums, counts = layer.centroids.clone(), layer.sums.clone(), layer.counts.clone()
    _, loss = layer.with_loss(x)
    distances = []
    for h in range(2):
        q, k = (part.view(3, 11, 2, 4)[:, :, h].reshape(-1, 4) for part in layer.qkv(x).chunk(3, 2)[:2])
        items = [normed(token) for token in (q if shared else torch.cat([q, k]))]
        own = [max(range(3), key=lambda c: float((item @ before[h, c]).detach())) for item in items]  # noqa: B023
        distances += [(item - before[h, c]).square().mean() for item, c in zip(items, own, strict=True)]
        for c in range(3):
            mine = [item for item, number in zip(items, own, strict=True) if number == c]
            total = 0.75 * sums[h, c] + 0.25 * sum(mine, torch.zeros(4, dtype=torch.float64))
            torch.testing.assert_close(layer.centroids[h, c], total / (0.75 * counts[h, c] + 0.25 * len(mine)))
    torch.testing.assert_close(loss, torch.stack(distances).mean())


def test_centroids_stay_in_evaluation() -> None:
    layer = build().eval()
    before = layer.centroids.clone()
    layer(torch.randn(1, 9, 8, dtype=torch.float64))
    assert torch.equal(layer.centroids, before)


def test_known_by_hand() -> None:
    """One cluster that takes all tokens, queries and keys of zeros: every output is the mean value."""
    layer = build(clusters=1, window=9)
    with torch.no_grad():
        layer.qkv.weight.zero_()
        layer.qkv.weight[16:] = torch.eye(8)
        layer.projection.weight.copy_(torch.eye(8))
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x.mean(1, keepdim=True).expand_as(x))


def test_moving_averages_find_clusters() -> None:
    """Tokens around two points: after a while each has a centroid of its own, right where it is."""
    layer = build(clusters=8, decay=0.9, heads=1, dim=8).train()
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    for _ in range(100):
        which = torch.randint(2, (1, 40), generator=generator)
        layer(points[which] + 0.1 * torch.randn(1, 40, 8, generator=generator, dtype=torch.float64))
    q = layer.qkv(points).chunk(3, 1)[0]
    items = torch.stack([normed(row) for row in q.detach()])
    own = (items @ layer.centroids[0].T).argmax(1)
    assert int(own[0]) != int(own[1])
    assert float((layer.centroids[0, own] - items).norm(dim=1).max()) < 0.1 * 8**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 7}, "dim=7: expected a positive multiple of heads=2"),
        ({"local_heads": 3}, "local_heads=3: expected at most heads=2"),
        ({"clusters": 0}, "clusters=0: expected at least 1"),
        ({"window": 0}, "window=0: expected at least 1 token"),
        ({"local_window": 0}, "local_window=0: expected at least 1 token"),
        ({"causal": True, "shared": False}, "shared=False: expected True with causal=True"),
        ({"decay": 1.0}, r"decay=1\.0: expected in \[0, 1\)"),
        ({"scale": 0.0}, r"scale=0\.0: expected above 0"),
    ],
)
def test_refuses_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)
