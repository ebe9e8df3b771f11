"""Neighbourhoods against NATTEN's definition, token by token, and dense softmax."""

from __future__ import annotations

import itertools

import pytest
import torch

from saccade.mechanisms.where import neighborhood
from saccade.mechanisms.where.neighborhood import Neighborhood
from saccade.types import BlockLayout, Boxes, Geometry


def dense_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over True pairs, in fp64."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -float("inf")).softmax(-1) @ v


def axis_neighbours(x, size, kernel, stride, dilation, causal):
    """Coordinates that coordinate x sees along one axis."""
    members = [y for y in range(size) if y % dilation == x % dilation]  # the dilation group, itself a dense axis
    here = members.index(x)
    group = [n for n in range(len(members)) if n // stride == here // stride]  # queries that share a window
    if causal:
        leader = group[-1]
        return [members[n] for n in range(max(0, leader - kernel + 1), here + 1)]
    leader = min(group[0] + stride // 2, len(members) - 1)  # the middle one, the right of two
    start = leader - kernel // 2
    while start < 0:  # windows that hang over a border move inwards
        start += 1
    while start + kernel > len(members):
        start -= 1
    return members[start : start + kernel]


def oracle_mask(grid, kernel, stride, dilation, causal, prefix=0, suffix=0):
    tokens = list(itertools.product(*map(range, grid)))
    total = prefix + len(tokens) + suffix
    mask = torch.ones(total, total, dtype=torch.bool)
    for i, x in enumerate(tokens):
        seen = set(itertools.product(*map(axis_neighbours, x, grid, kernel, stride, dilation, causal)))
        for j, y in enumerate(tokens):
            mask[prefix + i, prefix + j] = y in seen
    return mask


def inputs(tokens, heads=4, groups=2, batch=2):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, tokens, 8, dtype=torch.float64)
    return q, *(torch.randn(batch, groups, tokens, 8, dtype=torch.float64) for _ in range(2))


CASES = [
    # grid, kernel, stride, dilation, causal
    ((17,), (5,), (1,), (1,), (False,)),
    ((17,), (4,), (1,), (1,), (False,)),
    ((23,), (6,), (4,), (1,), (False,)),
    ((23,), (7,), (3,), (3,), (False,)),
    ((19,), (6,), (4,), (1,), (True,)),
    ((19,), (5,), (2,), (3,), (True,)),
    ((64,), (64,), (1,), (1,), (False,)),
    ((7, 9), (3, 5), (1, 1), (1, 1), (False, False)),
    ((8, 9), (4, 3), (2, 3), (2, 3), (False, False)),
    ((6, 11), (3, 5), (2, 4), (1, 2), (True, False)),
    ((6, 1), (3, 1), (1, 1), (2, 1), (False, False)),
    ((3, 5, 6), (2, 3, 4), (1, 2, 2), (1, 1, 1), (False, False, False)),
    ((5, 4, 6), (3, 2, 3), (2, 1, 3), (1, 2, 2), (True, False, False)),
]


@pytest.mark.parametrize("cost", [1e-9, 1e9])  # boxes, blocks
@pytest.mark.parametrize(("grid", "kernel", "stride", "dilation", "causal"), CASES)
def test_equals_the_masked_dense(grid, kernel, stride, dilation, causal, cost, monkeypatch):
    monkeypatch.setattr(neighborhood, "BOX_COST", cost)
    neighborhood._pattern.cache_clear()
    mask = oracle_mask(grid, kernel, stride, dilation, causal)
    q, k, v = inputs(len(mask))
    mechanism = Neighborhood(kernel, stride, dilation, causal, block=8)
    chosen = mechanism.pattern(q, k, Geometry(grid=grid))
    chosen.validate()
    assert isinstance(chosen, Boxes if cost < 1 else BlockLayout)
    assert torch.equal(chosen.to_dense()[0, 0], mask)
    out = mechanism(q, k, v, geometry=Geometry(grid=grid))
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)
    neighborhood._pattern.cache_clear()


@pytest.mark.parametrize(("prefix", "suffix"), [(3, 0), (0, 5), (7, 2)])
def test_text_sees_all_and_is_seen_by_all(prefix, suffix):
    grid, kernel, dilation = (6, 7), (3, 3), (1, 2)
    mask = oracle_mask(grid, kernel, (1, 1), dilation, (False, False), prefix, suffix)
    q, k, v = inputs(len(mask))
    geometry = Geometry(grid=grid, prefix=prefix, suffix=suffix)
    out = Neighborhood(kernel, 1, dilation, block=8)(q, k, v, geometry=geometry)
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)


def test_without_a_grid_all_tokens_lie_on_one_axis():
    q, k, v = inputs(21)
    out = Neighborhood(5, block=4)(q, k, v)
    mask = oracle_mask((21,), (5,), (1,), (1,), (False,))
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)


def test_causal_geometry_is_causal_on_one_axis():
    q, k, v = inputs(21)
    out = Neighborhood(5, stride=2, block=4)(q, k, v, geometry=Geometry(causal=True))
    mask = oracle_mask((21,), (5,), (2,), (1,), (True,))
    torch.testing.assert_close(out, dense_attention(q, k, v, mask), rtol=0, atol=1e-10)


def test_fractions_of_each_axis():
    q = torch.zeros(1, 1, 80, 4)
    chosen = Neighborhood(0.5, block=8).pattern(q, q, Geometry(grid=(8, 10)))
    assert torch.equal(chosen.to_dense()[0, 0], oracle_mask((8, 10), (4, 5), (1, 1), (1, 1), (False, False)))


def test_known_windows():
    """Six tokens: kernel 3 moves inside the borders; kernel = stride = 3 is blocked attention, as GNA says."""
    q = torch.zeros(1, 1, 6, 4)
    sliding = Neighborhood(3, block=2).pattern(q, q).to_dense()[0, 0].int().tolist()
    assert sliding[0] == [1, 1, 1, 0, 0, 0]
    assert sliding[2] == [0, 1, 1, 1, 0, 0]
    assert sliding[5] == [0, 0, 0, 1, 1, 1]
    blocked = Neighborhood(3, stride=3, block=2).pattern(q, q).to_dense()[0, 0]
    assert torch.equal(blocked, torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool())


def test_every_query_has_as_many_neighbours():
    q = torch.zeros(1, 1, 12 * 14, 4)
    mask = Neighborhood((5, 4), dilation=(2, 3)).pattern(q, q, Geometry(grid=(12, 14))).to_dense()
    assert bool((mask.sum(-1) == 20).all())


@pytest.mark.parametrize("dilation", [1, 6])
def test_a_pattern_built_in_inference_mode_serves_training(dilation):
    neighborhood._pattern.cache_clear()
    q, k, v = inputs(36)
    mechanism = Neighborhood(3, dilation=dilation, block=64 if dilation > 1 else 8)
    with torch.inference_mode():
        out = mechanism(q, k, v)
    again = mechanism(q.requires_grad_(), k, v)
    again.sum().backward()
    assert neighborhood._pattern.cache_info().hits == 1
    assert torch.equal(again, out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 0}, "kernel_size=0: expected"),
        ({"kernel_size": 1.5}, r"kernel_size=1\.5: expected"),
        ({"kernel_size": (3, 3, 3, 3)}, r"kernel_size=\(3, 3, 3, 3\): expected"),
        ({"stride": 0}, "stride=0: expected"),
        ({"dilation": (1, 0)}, r"dilation=\(1, 0\): expected"),
        ({"block": 0}, "block=0: expected"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Neighborhood(**settings)


@pytest.mark.parametrize(
    ("settings", "geometry", "message"),
    [
        ({"kernel_size": 7}, Geometry(grid=(6, 6)), r"kernel_size=7: expected kernel_size \* dilation=1 <= 6"),
        ({"kernel_size": 3, "dilation": 3}, Geometry(grid=(6, 6)), r"kernel_size=3: expected .*dilation=3 <= 6"),
        ({"kernel_size": 3, "stride": 4}, Geometry(grid=(6, 6)), "stride=4: expected at most kernel_size=3"),
        ({"kernel_size": (3, 3)}, Geometry(grid=(36,)), r"kernel_size=\(3, 3\): expected one for each of the 1 axes"),
        ({"kernel_size": 3}, Geometry(grid=(5, 6)), "tokens=36: expected 30"),
        ({"kernel_size": 3}, Geometry(grid=(6, 6), prefix=1), "tokens=36: expected 37"),
        ({"kernel_size": 3}, Geometry(grid=(6, 6), causal=True), r"geometry\.causal=True: expected False on grid"),
    ],
)
def test_refuses_geometry(settings, geometry, message):
    q = torch.zeros(1, 1, 36, 4)
    with pytest.raises(ValueError, match=message):
        Neighborhood(**settings)(q, q, q, geometry=geometry)


def test_refuses_fewer_queries_than_keys():
    q, k = torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 16, 4)
    with pytest.raises(ValueError, match="queries=8: expected 16"):
        Neighborhood(3)(q, k, k, geometry=Geometry(causal=True))
