"""SVG2 against its formula: Lloyd's algorithm in numpy, centroids' map, top p, and dense attention over the pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from saccade.mechanisms.where._kmeans import kmeans
from saccade.mechanisms.where.svg2 import SVG2
from saccade.types import Geometry


def lloyd(x: np.ndarray, clusters: int, iterations: int, seed: int) -> np.ndarray:
    """Cluster of each row of x, the first centroids being the rows that the seed draws."""
    places = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:clusters].numpy()
    centroids = x[places].copy()
    for iteration in range(iterations):
        labels = ((x[:, None] - centroids) ** 2).sum(-1).argmin(1)
        if iteration < iterations - 1:
            for c in set(labels.tolist()):
                centroids[c] = x[labels == c].mean(0)
    return labels


def oracle_mask(q: torch.Tensor, k: torch.Tensor, mechanism: SVG2, geometry: Geometry) -> torch.Tensor:
    batch, heads, total, dim = q.shape
    inside = slice(geometry.prefix, total - geometry.suffix)
    mask = torch.ones(batch, heads, total, total, dtype=torch.bool)
    for b, h in itertools.product(range(batch), range(heads)):
        queries, keys = q[b, h, inside].numpy(), k[b, h * k.shape[1] // heads, inside].numpy()
        q_label = lloyd(queries, mechanism.query_clusters, mechanism.iterations, mechanism.seed)
        k_label = lloyd(keys, mechanism.key_clusters, mechanism.iterations, mechanism.seed)
        kept = np.zeros((len(queries), len(keys)), dtype=bool)
        present = sorted(set(k_label.tolist()))
        for r in set(q_label.tolist()):
            centroid = queries[q_label == r].mean(0)
            mass = {c: (k_label == c).sum() * np.exp(centroid @ keys[k_label == c].mean(0) / dim**0.5) for c in present}
            total_mass, running = sum(mass.values()), 0.0
            for rank, c in enumerate(sorted(present, key=lambda c: -mass[c])):
                if running <= mechanism.top_p or rank < int(mechanism.least * mechanism.key_clusters):
                    kept |= (q_label == r)[:, None] & (k_label == c)
                running += mass[c] / total_mass
        mask[b, h, inside, inside] = torch.from_numpy(kept)
    return mask


def attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over True pairs."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -float("inf")).softmax(-1) @ v


def inputs(tokens: int, heads: int = 2, groups: int = 1, batch: int = 2) -> list[torch.Tensor]:
    """Tokens around a few directions, in no order."""
    generator = torch.Generator().manual_seed(tokens)
    directions = 2 * torch.randn(6, 8, generator=generator, dtype=torch.float64)
    kinds = torch.randint(6, (batch, 1, tokens), generator=generator)
    shapes = ((batch, n, tokens, 8) for n in (heads, groups, groups))
    return [directions[kinds] + torch.randn(s, generator=generator, dtype=torch.float64) / 2 for s in shapes]


SETTINGS = {"query_clusters": 5, "key_clusters": 9, "iterations": 4, "least": 0.1, "block": 8}


@pytest.mark.parametrize(
    "geometry",
    [Geometry(), Geometry(grid=(5, 8), prefix=3), Geometry(grid=(2, 4, 5), prefix=2, suffix=7)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("top_p", [0.3, 0.9])
@pytest.mark.parametrize("groups", [1, 2])
def test_output_is_that_of_the_formula(groups: int, top_p: float, geometry: Geometry) -> None:
    tokens = 41 if geometry.grid is None else geometry.grid_tokens + geometry.prefix + geometry.suffix
    q, k, v = inputs(tokens, groups=groups)
    mechanism = SVG2(**SETTINGS, top_p=top_p)
    mask = oracle_mask(q, k, mechanism, geometry)
    layout = mechanism.pattern(q, k, geometry)
    layout.validate()
    assert layout.density() == pytest.approx(float(mask.double().mean()), abs=1e-12)
    out, lse = mechanism(q, k, v, geometry=geometry, return_lse=True)
    torch.testing.assert_close(out, attention(q, k, v, mask), rtol=0, atol=1e-10)
    scores = q @ k.repeat_interleave(2 // groups, 1).mT / 8**0.5
    wanted = scores.masked_fill(~mask, -float("inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double(), wanted, rtol=0, atol=1e-4)


def test_known_by_hand() -> None:
    """Keys of two kinds, in turn; queries of the first kind read keys of the first kind only, wherever they lie."""
    kinds = 8 * torch.eye(2)
    q, k = kinds[[0, 0, 0, 0, 1, 1]][None, None], kinds[[0, 1, 0, 1, 1, 0]][None, None]
    mechanism = SVG2(query_clusters=4, key_clusters=4, top_p=0.9, least=0.0, block=1)
    plan = mechanism.plan(q, k, Geometry())
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[plan.rows.order[0, 0][:, None], plan.columns.order[0, 0]] = plan.layout.to_dense()[0, 0]
    assert mask[0].tolist() == [True, False, True, False, False, True]
    assert mask[5].tolist() == [False, True, False, True, True, False]


def test_kmeans_lowers_the_spread_until_it_settles() -> None:
    x = inputs(200)[0]

    def spread(iterations: int) -> float:
        labels = kmeans(x, 6, iterations, seed=1)
        total = 0.0
        for b, h, c in itertools.product(range(2), range(2), range(6)):
            inside = x[b, h, labels[b, h] == c]
            total += float((inside - inside.mean(0)).square().sum()) if len(inside) else 0.0
        return total

    spreads = [spread(n) for n in (1, 2, 4, 30)]
    assert all(low <= high + 1e-9 for high, low in zip(spreads, spreads[1:], strict=False))
    assert torch.equal(kmeans(x, 6, 30, seed=1), kmeans(x, 6, 31, seed=1))


def test_better_than_random_clusters() -> None:
    """Tokens of six kinds in no order: kept cluster pairs err far less than as many random pairs of the clusters."""
    q, k, v = inputs(240, batch=1)
    exact = attention(q, k, v, torch.ones(240, 240, dtype=torch.bool))
    mechanism = SVG2(query_clusters=12, key_clusters=12, top_p=0.3, least=0.0, iterations=10, block=16)
    plan = mechanism.plan(q, k, Geometry())
    assert plan.layout.density() < 0.4
    error = float((mechanism(q, k, v) - exact).norm())
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(1, 2, 12, 12, generator=generator).argsort(-1) < round(plan.layout.density() * 12 + 0.5)
    q_labels, k_labels = kmeans(q, 12, 10, 0), kmeans(k, 12, 10, 0)
    mask = torch.stack([random[0, h][q_labels[0, h]][:, k_labels[0, 0]] for h in range(2)])[None]
    assert error < 0.5 * float((attention(q, k, v, mask).nan_to_num() - exact).norm())


@pytest.mark.parametrize(
    ("name", "value"),
    [("query_clusters", 0), ("key_clusters", 0), ("top_p", 0.0), ("least", 1.5), ("iterations", 0), ("block", 0)],
)
def test_bad_setting(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        SVG2(**{name: value})


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_hardly_any_tokens(tokens: int) -> None:
    q, k, v = inputs(tokens)
    assert SVG2()(q, k, v).shape == q.shape
