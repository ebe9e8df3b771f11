"""Neighbour-aware attention, token by token: a causal mask in which the image's part is replaced by neighbours."""

from __future__ import annotations

import itertools

import pytest
import torch

from saccade.mechanisms.where.neighbor_aware import NeighborAware
from saccade.types import Geometry


def oracle_mask(grid, window, prefix, suffix, rule):
    """True = attend. The rule: "text" hides the future but within the image, "causal" always, "all" never."""
    cells = list(itertools.product(*map(range, grid)))
    total = prefix + len(cells) + suffix
    mask = torch.ones(total, total, dtype=torch.bool)
    if rule != "all":
        mask = torch.tensor([[j <= i for j in range(total)] for i in range(total)])
    for i, x in enumerate(cells):
        for j, y in enumerate(cells):
            near = all(abs(a - b) <= int((window - 1) / 2) for a, b in zip(x, y, strict=True))
            mask[prefix + i, prefix + j] = near and (rule != "causal" or j <= i)
    return mask


def run(mask, mechanism, geometry, queries=None):
    """The mechanism's output and that of dense attention over True pairs, for the last queries."""
    torch.manual_seed(0)
    total = len(mask)
    q = torch.randn(2, 4, total, 8, dtype=torch.float64)[:, :, -(queries or total) :]
    k, v = (torch.randn(2, 2, total, 8, dtype=torch.float64) for _ in range(2))
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~mask[-q.shape[2] :], -float("inf"))
    return mechanism(q, k, v, geometry=geometry), scores.softmax(-1) @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize(
    ("rule", "causal", "causal_text"), [("text", False, True), ("causal", True, False), ("all", False, False)]
)
@pytest.mark.parametrize(
    ("grid", "window", "prefix", "suffix"),
    [
        ((6, 7), 3, 5, 9),
        ((5, 4), 5, 0, 3),
        ((4, 6), 1, 2, 0),
        ((3, 4, 5), 3, 3, 4),
        ((5, 5), 9, 1, 1),
        ((4, 4), 3, 0, 0),
    ],
)
def test_equals_the_mask_of_the_authors(grid, window, prefix, suffix, rule, causal, causal_text):
    mask = oracle_mask(grid, window, prefix, suffix, rule)
    mechanism = NeighborAware(window, causal_text, block=8)
    geometry = Geometry(causal=causal, grid=grid, prefix=prefix, suffix=suffix)
    q = torch.zeros(1, 1, len(mask), 4)
    chosen = mechanism.pattern(q, q, geometry)
    chosen.validate()
    assert torch.equal(chosen.to_dense()[0, 0], mask)
    torch.testing.assert_close(*run(mask, mechanism, geometry), rtol=0, atol=1e-10)


def test_known_neighbours():
    """One token of text, an image of 2 x 3, two tokens of text."""
    q = torch.zeros(1, 1, 9, 4)
    geometry = Geometry(grid=(2, 3), prefix=1, suffix=2)
    mask = NeighborAware(3, causal_text=True, block=4).pattern(q, q, geometry).to_dense()[0, 0].int().tolist()
    assert mask[0] == [1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert mask[1] == [1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert mask[2] == [1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert mask[7] == [1, 1, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("queries", [1, 4])
def test_text_behind_the_image_may_come_later(queries):
    """Decoding over a cache that holds the image: the rows of the whole pattern."""
    mask = oracle_mask((4, 5), 3, 3, 4, "causal")
    geometry = Geometry(causal=True, grid=(4, 5), prefix=3, suffix=4)
    out, wanted = run(mask, NeighborAware(3, block=8), geometry, queries)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)


def test_the_image_comes_whole():
    q, k = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 27, 4)
    geometry = Geometry(causal=True, grid=(4, 5), prefix=3, suffix=4)
    with pytest.raises(ValueError, match="queries=5: expected 27, as many as keys"):
        NeighborAware(3)(q, k, k, geometry=geometry)


def test_without_a_grid_there_is_no_image():
    for rule, causal_text in (("all", False), ("text", True)):
        mask = oracle_mask((1,), 3, 12, 0, rule)
        torch.testing.assert_close(*run(mask, NeighborAware(3, causal_text, block=8), Geometry()), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window=0: expected an odd number of tokens"),
        ({"window": 4}, "window=4: expected an odd number of tokens"),
        ({"block": 0}, "block=0: expected at least 1 token"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NeighborAware(**settings)
