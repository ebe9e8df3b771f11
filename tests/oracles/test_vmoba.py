"""VMoBA against its formula, gate by gate, with plain sorting."""

from __future__ import annotations

import itertools

import pytest
import torch

from saccade.mechanisms.where.vmoba import VMoBA
from saccade.types import Geometry


def chunk_members(grid: tuple[int, ...], sizes: tuple[int, ...]) -> list[list[int]]:
    """Places in the grid of each chunk's tokens: one size cuts the first axis, more the last ones."""
    whole = list(grid)
    axes = [0] if len(sizes) == 1 else range(len(grid) - len(sizes), len(grid))
    for axis, size in zip(axes, sizes, strict=True):
        whole[axis] = size
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, x in enumerate(itertools.product(*map(range, grid))):
        groups.setdefault(tuple(a // b for a, b in zip(x, whole, strict=True)), []).append(place)
    return list(groups.values())


def up_to_threshold(gates: dict, own: set, threshold: float) -> set:
    """The authors' rule on one scope: names of the gates kept."""
    low, high = min(gates.values()), max(gates.values())
    spread = high - low if high - low > 1e-6 else 1.0
    normal = {name: (gate - low) / spread for name, gate in gates.items()}
    total = sum(normal.values()) + 1e-6
    wanted = max(threshold - sum(normal[name] for name in own) / total, 0.0)
    kept, running = set(own), 0.0
    for name in sorted((name for name in gates if name not in own), key=lambda name: -normal[name]):
        kept.add(name)
        running += normal[name]
        if running / total >= wanted:
            break
    return kept


def oracle_mask(q: torch.Tensor, k: torch.Tensor, mechanism: VMoBA, geometry: Geometry, sizes: tuple) -> torch.Tensor:
    batch, heads, total, _ = q.shape
    chunks = chunk_members((total,) if geometry.grid is None else geometry.grid, sizes)
    cells = sum(map(len, chunks))
    mask = torch.ones(batch, heads, total, total, dtype=torch.bool)
    for b in range(batch):
        gates, own = {}, set()
        for h, (c, members) in itertools.product(range(heads), enumerate(chunks)):
            mean = k[b, h * k.shape[1] // heads, [geometry.prefix + p for p in members]].mean(0)
            for i in range(cells):
                gates[h, i, c] = float(q[b, h, geometry.prefix + i] @ mean)
            own |= {(h, i, c) for i in members}
        scope = {"query": lambda n: n[:2], "head": lambda n: n[0], "all": lambda _: 0, "chunk": lambda n: n[2]}
        scopes: dict = {}
        for name in gates:
            scopes.setdefault(scope[mechanism.scope](name), []).append(name)
        kept: set = set()
        for names in scopes.values():
            mine = own & set(names)
            if mechanism.topk is None:
                kept |= up_to_threshold({name: gates[name] for name in names}, mine, mechanism.threshold)
            else:
                count = min(mechanism.topk, len(chunks)) * len({name[:2] for name in names})
                kept |= set(sorted(names, key=lambda name: (name not in mine, -gates[name]))[:count])
        for h, i, c in gates:
            if (h, i, c) not in kept:
                mask[b, h, geometry.prefix + i, [geometry.prefix + p for p in chunks[c]]] = False
    return mask


def attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v over True pairs."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -float("inf")).softmax(-1) @ v


def inputs(tokens: int, heads: int = 2, groups: int = 1, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, n, tokens, 8) for n in (heads, groups, groups))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).cumsum(2) / 3 for shape in shapes]


CASES = [
    # geometry, chunk
    (Geometry(grid=(5, 3, 4)), (2,)),
    (Geometry(grid=(2, 5, 7), prefix=3, suffix=2), (2, 3)),
    (Geometry(grid=(4, 4, 5), suffix=4), (2, 3, 2)),
    (Geometry(grid=(6, 9), prefix=5), (4, 4)),
    (Geometry(), (7,)),
]


@pytest.mark.parametrize(("geometry", "chunk"), CASES, ids=str)
@pytest.mark.parametrize("scope", ["query", "head", "all", "chunk"])
@pytest.mark.parametrize("settings", [{"threshold": 0.25}, {"threshold": 0.6}, {"topk": 2}], ids=str)
def test_output_is_that_of_the_formula(settings: dict, scope: str, geometry: Geometry, chunk: tuple) -> None:
    if scope == "chunk" and "topk" in settings:
        pytest.skip("topk is not defined for the queries of a chunk")
    tokens = 45 if geometry.grid is None else geometry.grid_tokens + geometry.prefix + geometry.suffix
    q, k, v = inputs(tokens)
    mechanism = VMoBA(chunks=(chunk,), scope=scope, block=8, **settings)
    mask = oracle_mask(q, k, mechanism, geometry, chunk)
    layout = mechanism.pattern(q, k, geometry)
    layout.validate()
    assert layout.density() == pytest.approx(float(mask.double().mean()), abs=1e-12)
    out = mechanism(q, k, v, geometry=geometry)
    torch.testing.assert_close(out, attention(q, k, v, mask), rtol=0, atol=1e-10)


def test_known_by_hand() -> None:
    """Three chunks of two keys; query 0 likes chunk 2, query 2 its own above all, which alone passes a quarter."""
    k = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0], [-1.0, 0.0]])[None, None]
    q = torch.tensor([[-3.0, 1.0]] * 2 + [[0.5, 3.0]] * 2 + [[0.0, 1.0]] * 2)[None, None]
    mask = VMoBA(chunks=((2,),), scope="query", block=2).pattern(q, k, Geometry()).to_dense()[0, 0]
    assert mask[0].tolist() == [True, True, False, False, True, True]
    assert mask[2].tolist() == [True, True, True, True, False, False]
    assert mask[4].tolist() == [False, False, True, True, True, True]


def test_layers_take_turns() -> None:
    q = torch.randn(1, 1, 24, 4, generator=torch.Generator().manual_seed(0))
    geometry, chunks = Geometry(grid=(2, 3, 4)), ((1,), (3, 2), (2, 3, 1))
    counts = [VMoBA(chunks=chunks, layer=layer).plan(q, q, geometry).columns.sizes.tolist() for layer in range(5)]
    assert counts == [[[[12, 12]]], [[[12, 12]]], [[[6, 6, 6, 6]]], [[[12, 12]]], [[[12, 12]]]]
    orders = [VMoBA(chunks=chunks, layer=layer).plan(q, q, geometry).rows.order[0, 0, :4].tolist() for layer in (0, 1)]
    assert orders == [[0, 1, 2, 3], [0, 1, 4, 5]]


def test_better_than_random_chunks() -> None:
    """On a smooth field, kept chunks err less than as many random ones beside the own."""
    generator = torch.Generator().manual_seed(0)
    place = torch.stack(torch.meshgrid(*(torch.linspace(0, 3, 16),) * 2, indexing="ij"), -1).view(256, 2)
    field = torch.cat([place.sin(), place.cos()], -1) @ torch.randn(4, 16, generator=generator) * 2
    q, k = (field + 0.3 * torch.randn(1, 2, 256, 16, generator=generator) for _ in range(2))
    v = torch.randn(1, 2, 256, 16, generator=generator) + field
    exact = attention(q, k, v, torch.ones(256, 256, dtype=torch.bool))
    mechanism, geometry = VMoBA(chunks=((4, 4),), threshold=0.4, block=16), Geometry(grid=(16, 16))
    plan = mechanism.plan(q, k, geometry)
    assert plan.layout.density() < 0.5
    error = float((mechanism(q, k, v, geometry=geometry) - exact).norm())
    random = torch.rand(1, 2, 256, 16, generator=generator).argsort(-1) < round(plan.layout.density() * 16 + 0.5)
    back = plan.rows.order[0, 0].argsort()
    own = torch.eye(16, dtype=torch.bool).repeat_interleave(16, 0)
    mask = (random | own).repeat_interleave(16, 3)[..., back[:, None], back]
    assert error < 0.5 * float((attention(q, k, v, mask) - exact).norm())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunks": ()}, r"chunks=\(\): expected tuples of one to three sizes"),
        ({"chunks": ((0,),)}, r"chunks=\(\(0,\),\): expected tuples"),
        ({"chunks": ((1.5,),)}, r"chunks=\(\(1\.5,\),\): expected tuples"),
        ({"layer": -1}, "layer=-1: expected"),
        ({"threshold": 0.0}, r"threshold=0\.0: expected"),
        ({"topk": 0}, "topk=0: expected"),
        ({"scope": "block"}, "scope='block': expected one of"),
        ({"scope": "chunk", "topk": 2}, "scope='chunk': expected 'query', 'head' or 'all' together with topk"),
        ({"block": 0}, "block=0: expected"),
    ],
)
def test_refuses_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VMoBA(**settings)


def test_refuses_more_axes_than_the_grid_has() -> None:
    q, k, v = inputs(12)
    with pytest.raises(ValueError, match=r"chunks=.*expected a chunk of at most 2 sizes for grid=\(3, 4\), layer=2"):
        VMoBA(layer=2)(q, k, v, geometry=Geometry(grid=(3, 4)))


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(tokens: int) -> None:
    q, k, v = inputs(tokens)
    assert VMoBA()(q, k, v).shape == q.shape
