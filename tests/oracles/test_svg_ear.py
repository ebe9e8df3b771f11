"""SVG-EAR against its formulas: Lloyd's clusters, the estimated errors, greedy choice, centroids for the rest."""

from __future__ import annotations

import itertools

import pytest
import torch

from saccade.mechanisms.where.svg2 import SVG2
from saccade.mechanisms.where.svg_ear import SVGEAR
from saccade.types import Geometry


def lloyd(x: torch.Tensor, clusters: int, iterations: int, seed: int) -> torch.Tensor:
    """Cluster of each row of x, the first centroids being the rows that the seed draws."""
    places = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:clusters]
    centroids = x[places].clone()
    for iteration in range(iterations):
        labels = torch.cdist(x, centroids).argmin(1)
        if iteration < iterations - 1:
            for c in labels.unique().tolist():
                centroids[c] = x[labels == c].mean(0)
    return labels


def oracle(q, k, v, mechanism: SVGEAR, geometry: Geometry) -> torch.Tensor:
    """The output of one head."""
    total, dim = q.shape
    inside = torch.arange(geometry.prefix, total - geometry.suffix)
    text = [i for i in range(total) if i not in inside.tolist()]
    q_label, k_label = (
        lloyd(x[inside].detach(), clusters, mechanism.iterations, mechanism.seed)
        for x, clusters in ((q, mechanism.query_clusters), (k, mechanism.key_clusters))
    )
    rows = {i: inside[q_label == i] for i in q_label.unique().tolist()}
    columns = {c: inside[k_label == c] for c in k_label.unique().tolist()}
    worth = {}
    for i, c in itertools.product(rows, columns):
        probe = q[rows[i]].mean(0).detach() / dim**0.5
        normal = (k[inside].detach() @ probe).exp().sum()
        keys = k[columns[c]].detach()
        lost = ((keys @ probe).exp() - (keys.mean(0) @ probe).exp()) / normal
        worth[i, c] = float(lost.square().sum()) / len(keys)
    chosen, spent = set(), 0
    for i, c in sorted(worth, key=lambda pair: -worth[pair]):
        spent += len(rows[i]) * len(columns[c])
        if spent > mechanism.density * len(inside) ** 2:
            break
        chosen.add((i, c))
    out = torch.zeros(total, v.shape[1], dtype=v.dtype)
    for i, tokens in rows.items():
        exact = [*text, *(j for c in columns if (i, c) in chosen for j in columns[c].tolist())]
        others = [c for c in columns if (i, c) not in chosen]
        means = [x[columns[c]].mean(0, keepdim=True).expand(len(columns[c]), -1) for x in (k, v) for c in others]
        keys = torch.cat([k[exact], *means[: len(others)]])
        values = torch.cat([v[exact], *means[len(others) :]])
        out[tokens] = (q[tokens] @ keys.T / dim**0.5).softmax(1) @ values
    out[text] = (q[text] @ k.T / dim**0.5).softmax(1) @ v
    return out


def inputs(tokens: int, heads: int = 2, groups: int = 1, batch: int = 2) -> list[torch.Tensor]:
    """Tokens around a few directions, in no order."""
    generator = torch.Generator().manual_seed(tokens)
    directions = 2 * torch.randn(6, 8, generator=generator, dtype=torch.float64)
    kinds = torch.randint(6, (batch, 1, tokens), generator=generator)
    shapes = ((batch, n, tokens, 8) for n in (heads, groups, groups))
    return [directions[kinds] + torch.randn(s, generator=generator, dtype=torch.float64) / 2 for s in shapes]


@pytest.mark.parametrize(
    "geometry", [Geometry(), Geometry(grid=(5, 8), prefix=3), Geometry(grid=(2, 4, 5), prefix=2, suffix=7)], ids=str
)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("groups", [1, 2])
def test_output_and_gradients_are_those_of_the_formula(groups: int, density: float, geometry: Geometry) -> None:
    tokens = 41 if geometry.grid is None else geometry.grid_tokens + geometry.prefix + geometry.suffix
    q, k, v = leaves = [x.requires_grad_() for x in inputs(tokens, groups=groups)]
    mechanism = SVGEAR(query_clusters=5, key_clusters=9, density=density, iterations=4, block=8)
    shared = 2 // groups
    wanted = torch.stack([
        torch.stack([oracle(q[b, h], k[b, h // shared], v[b, h // shared], mechanism, geometry) for h in (0, 1)])
        for b in (0, 1)
    ])  # fmt: skip
    out, lse = mechanism(q, k, v, geometry=geometry, return_lse=True)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
    assert lse.shape == (2, 2, tokens)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, gradient in zip(*(torch.autograd.grad(x, leaves, cotangent) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-8)


def test_known_by_hand() -> None:
    """Clusters of equal keys need nothing computed: their centroids are exact, and the error everywhere 0."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 20, 8, generator=generator, dtype=torch.float64)
    kinds = torch.arange(20) % 4
    k = 3 * torch.randn(4, 8, generator=generator, dtype=torch.float64)[kinds].expand(1, 2, 20, 8)
    v = torch.randn(1, 2, 20, 5, generator=generator, dtype=torch.float64)
    mechanism = SVGEAR(query_clusters=3, key_clusters=20, density=0.0, iterations=10)
    assert mechanism.pattern(q, k).density() == 0.0
    exact = (q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(mechanism(q, k, v), exact, rtol=0, atol=1e-12)


def test_the_error_decides_and_not_the_weight() -> None:
    """Of two clusters of keys the heavier is of equal keys; the lighter one, of unlike keys, is computed."""
    k = torch.tensor([3.0, 3.0, 3.0, 3.0, -1.0, -0.5, -2.0, -1.5])[None, None, :, None].double()
    q = torch.ones(1, 1, 8, 1, dtype=torch.float64)
    mechanism = SVGEAR(query_clusters=1, key_clusters=2, density=0.5, iterations=20, block=1)
    plan = mechanism.plan(q, k, Geometry())
    read = plan.columns.order[0, 0][plan.layout.to_dense()[0, 0, 0]]
    assert sorted(read.tolist()) == [4, 5, 6, 7]


def test_errs_less_than_svg2_and_random_pairs_of_the_same_density() -> None:
    q, k, v = inputs(240, batch=1)
    v = v + k
    exact = (q @ k.mT / 8**0.5).softmax(-1) @ v
    same = {"query_clusters": 12, "key_clusters": 12, "iterations": 10, "block": 16}
    svg2 = SVG2(**same, top_p=0.3, least=0.0)
    kept = svg2.pattern(q, k).density()
    ear = SVGEAR(**same, density=kept)
    assert ear.pattern(q, k).density() <= kept
    errors = [float((mechanism(q, k, v) - exact).norm()) for mechanism in (ear, svg2)]
    plan = svg2.plan(q, k, Geometry())
    generator = torch.Generator().manual_seed(0)
    pairs = torch.rand(1, 2, 12, 12, generator=generator).argsort(-1) < round(kept * 12 + 0.5)
    mask = torch.stack([pairs[0, h][plan.rows.labels[0, h]][:, plan.columns.labels[0, 0]] for h in range(2)])[None]
    moved = plan.rows.move(q), plan.columns.move(k), plan.columns.move(v)
    random = (moved[0] @ moved[1].mT / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num() @ moved[2]
    errors.append(float((plan.rows.restore(random) - exact).norm()))
    assert errors[0] < 0.5 * errors[1] < 0.5 * 0.5 * errors[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [("query_clusters", 0), ("key_clusters", 0), ("density", -0.5), ("iterations", 0), ("block", 0)],
)
def test_bad_setting(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        SVGEAR(**{name: value})


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_hardly_any_tokens(tokens: int) -> None:
    q, k, v = inputs(tokens)
    assert SVGEAR()(q, k, v).shape == q.shape
