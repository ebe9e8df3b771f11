"""Neighbourhoods against NATTEN's definition, token by token, and dense softmax."""

from __future__ import annotations

import itertools

import pytest
import torch

from saccade.mechanisms.where import neighborhood
from saccade.mechanisms.where.neighborhood import Neighborhood, useful_strides
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


HUNYUAN, COSMOS, FLUX = (30, 48, 80), (16, 44, 80), (256, 256)
SHARES = {HUNYUAN: 0.607, COSMOS: 0.587, FLUX: 0.518}
"""Time that these models spend in self-attention, by GNA's Table 1."""


@pytest.mark.parametrize(
    ("grid", "kernel", "q_tile", "kv_tile", "speedups"),
    [
        (
            HUNYUAN, (18, 24, 24), (4, 8, 8), (2, 8, 8),  # tiles as stated under Figure 3
            {
                (1, 1, 1): 1.73, (2, 1, 1): 1.78, (1, 1, 8): 1.99, (2, 1, 8): 2.02, (1, 8, 8): 2.17, (2, 8, 8): 2.20,
                (16, 8, 8): 2.23, (18, 24, 24): 2.06,
            },
        ),
        # The paper does not state the tiles of the others: these, of 256 queries and 128 keys, reproduce its numbers.
        (HUNYUAN, (30, 40, 40), (2, 16, 8), (2, 8, 8), {
            (1, 1, 1): 1.21, (1, 1, 8): 1.44, (1, 32, 8): 1.55, (30, 40, 40): 1.44,
        }),
        (COSMOS, (16, 32, 48), (8, 4, 8), (4, 4, 8), {
            (1, 1, 1): 1.35, (1, 8, 1): 1.42, (1, 1, 16): 1.42, (1, 8, 16): 1.50,
        }),
        (COSMOS, (16, 24, 16), (8, 4, 8), (4, 4, 8), {
            (1, 1, 1): 1.90, (1, 8, 1): 1.96, (1, 1, 16): 2.05, (1, 8, 16): 2.10,
        }),
        (FLUX, (80, 80), (16, 16), (16, 8), {(1, 1): 1.76, (16, 1): 1.84, (16, 16): 1.88}),
    ],
)  # fmt: skip
def test_speedups_of_the_paper(grid, kernel, q_tile, kv_tile, speedups):
    """GNA, Tables 2 to 5, column "NATTENSim"; they and the shares are given to two and three digits."""
    for stride, wanted in speedups.items():
        count = Neighborhood(kernel, stride).tiles(grid, q_tile, kv_tile)
        assert count.end_to_end(SHARES[grid]) == pytest.approx(wanted, abs=0.016), stride


def test_figure_3_of_the_paper():
    """HunyuanVideo: 3.3x for standard neighbourhoods, 11.1x where nothing is wasted; the strides it lists."""
    tiles = ((4, 8, 8), (2, 8, 8))
    standard, best = (Neighborhood((18, 24, 24), s).tiles(HUNYUAN, *tiles) for s in (1, (16, 8, 8)))
    assert (standard.visited, standard.total, round(standard.speedup, 1)) == (275, 900, 3.3)
    assert (best.visited, round(best.speedup, 1), round(best.bound, 1)) == (81, 11.1, 11.1)
    assert best.block_sparse
    assert not standard.block_sparse
    assert useful_strides(30, 18, 4, 2) == {1: 11, 2: 10, 16: 9}
    assert useful_strides(48, 24, 8, 8) == useful_strides(80, 24, 8, 8) == {1: 5, 8: 3}


def visited_tiles(mask, grid, q_tile, kv_tile, dynamic):
    """Most tiles of keys whose keys some query of a tile sees, or that the box around these keys takes."""
    places = torch.tensor(list(itertools.product(*map(range, grid))))
    q_tiles, kv_tiles = (places // torch.tensor(tile) for tile in (q_tile, kv_tile))
    most = 0
    for tile in q_tiles.unique(dim=0):
        seen = mask[(q_tiles == tile).all(1)].any(0)
        if dynamic:
            box = places[seen].amax(0) - places[seen].amin(0) + 1
            most = max(most, int((-(-box // torch.tensor(kv_tile))).prod()))
        else:
            most = max(most, len(kv_tiles[seen].unique(dim=0)))
    return most


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("grid", "kernel", "stride", "q_tile", "kv_tile"),
    [
        ((23,), (6,), (4,), (5,), (3,)),
        ((8, 9), (4, 3), (2, 3), (3, 4), (2, 2)),
        ((9, 10), (5, 4), (1, 1), (4, 2), (2, 8)),
        ((3, 5, 6), (2, 3, 4), (1, 2, 2), (2, 2, 2), (2, 1, 4)),
    ],
)
def test_tiles_are_those_with_a_pair(grid, kernel, stride, q_tile, kv_tile, dynamic):
    count = Neighborhood(kernel, stride).tiles(grid, q_tile, kv_tile, dynamic=dynamic)
    mask = oracle_mask(grid, kernel, stride, (1,) * len(grid), (False,) * len(grid))
    assert count.visited == visited_tiles(mask, grid, q_tile, kv_tile, dynamic)


@pytest.mark.parametrize(("q_tile", "kv_tile"), [(8, 8), (12, 8), (6, 4), (5, 7)])
def test_tiles_of_consecutive_tokens(q_tile, kv_tile):
    grid, kernel = (8, 9), (4, 3)
    count = Neighborhood(kernel).tiles(grid, q_tile, kv_tile)
    mask = oracle_mask(grid, kernel, (1, 1), (1, 1), (False, False))
    assert count.visited == visited_tiles(mask, (72,), (q_tile,), (kv_tile,), dynamic=False)
    assert (count.total, count.tokens, count.window) == (-(-72 // kv_tile), 72, 12)


def test_phases_of_a_dilation_are_tiled_apart():
    """24 places, 4 apart: phases of 6 places, in which a tile of 2 queries and windows of 3 needs 4 places."""
    count = Neighborhood(3, dilation=4).tiles((24,), (2,), (2,))
    assert (count.visited, count.total) == (3, 12)
    assert Neighborhood(3, dilation=4).tiles((24,), (2,), (2,), dynamic=True).visited == 2


@pytest.mark.parametrize(
    ("settings", "tiles", "message"),
    [
        ({}, {"q_tile": (4,), "kv_tile": (4, 4)}, r"q_tile=\(4,\): expected an int, or one size for each of the 2"),
        ({}, {"q_tile": (4, 0), "kv_tile": (4, 4)}, r"q_tile=\(4, 0\): expected at least 1 token"),
        ({}, {"q_tile": (4, 4), "kv_tile": 16}, r"kv_tile=16: expected as q_tile=\(4, 4\)"),
        ({}, {"q_tile": 16, "kv_tile": 16, "dynamic": True}, "dynamic=True: expected False"),
        ({"dilation": 2}, {"q_tile": 16, "kv_tile": 16}, "dilation=2: expected 1"),
    ],
)
def test_refuses_tiles(settings, tiles, message):
    with pytest.raises(ValueError, match=message):
        Neighborhood(3, **settings).tiles((8, 9), **tiles)


def test_refuses_a_share_that_is_none():
    with pytest.raises(ValueError, match=r"share=1\.5: expected a share in \[0, 1\]"):
        Neighborhood(3).tiles((8, 9), (4, 4), (4, 4)).end_to_end(1.5)
