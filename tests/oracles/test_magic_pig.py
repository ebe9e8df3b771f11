"""MagicPIG against loops over tables and bits, and its estimate against what it estimates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache import _hash_tables, reading
from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.magic_pig import MagicPIG


def bits_of(x: Tensor, planes: Tensor, bits: int, tables: int) -> list[tuple[bool, ...]]:
    return [tuple(float(x @ planes[:, t * bits + i]) > 0 for i in range(bits)) for t in range(tables)]


def oracle(q: Tensor, k: Tensor, v: Tensor, prompt: int, policy: MagicPIG) -> Tensor:
    batch, heads, total, dim = q.shape
    share, bits, tables = heads // k.shape[1], policy.bits, policy.tables
    generator = torch.Generator().manual_seed(policy.seed)
    planes = torch.randn(dim, bits * tables, generator=generator, dtype=torch.float64)
    out = torch.zeros(batch, heads, total, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // share], v[b, h // share]
            mean = keys[: prompt + 1].mean(0)
            for i in range(total):
                query, weights = q[b, h, i], {}
                for j in range(i + 1):
                    weight = math.exp(float(query @ keys[j]) / math.sqrt(dim))
                    if i >= prompt and policy.sinks <= j <= i - policy.local:
                        pairs = zip(
                            bits_of(query, planes, bits, tables),
                            bits_of(keys[j] - mean, planes, bits, tables),
                            strict=True,
                        )
                        if sum(mine == theirs for mine, theirs in pairs) < 2:
                            continue
                        cosine = float(query @ (keys[j] - mean) / query.norm() / (keys[j] - mean).norm())
                        once = (1 - math.acos(cosine) / math.pi) ** bits
                        never, single = (1 - once) ** tables, tables * once * (1 - once) ** (tables - 1)
                        weight /= 1 - never - single
                    weights[j] = weight
                out[b, h, i] = sum(w * values[j] for j, w in weights.items()) / sum(weights.values())
    return out


def inputs(heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 5))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize(("tail", "copied"), [(0, 2**22), (10**9, 1)])
@pytest.mark.parametrize(
    ("heads", "groups", "bits", "tables", "sinks", "local"),
    [(4, 2, 2, 4, 2, 3), (2, 1, 3, 6, 0, 1), (2, 2, 0, 2, 1, 1)],
)
def test_matches_the_oracle(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, bits: int, tables: int, sinks: int, local: int, tail: int,
    copied: int,
) -> None:  # fmt: skip
    """With tokens that left the window compared, or taken into the tables at once; weighed together or head by head."""
    monkeypatch.setattr(reading, "COPIED", copied)
    monkeypatch.setattr(_hash_tables, "TAIL", tail)
    q, k, v = inputs(heads, groups, 22)
    policy = MagicPIG(bits=bits, tables=tables, sinks=sinks, local=local, dense_layers=())
    layer = CachedAttention(policy)
    sizes = [16] + [1] * 6
    parts = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    out = torch.cat([layer(*part) for part in parts], 2)
    torch.testing.assert_close(out, oracle(q, k, v, 16, policy), rtol=0, atol=1e-9)


def test_the_probability_is_that_of_the_hashes() -> None:
    """Over many draws of the projections, keys at 60 degrees are sampled as often as the formula says."""
    q = torch.tensor([1.0, 0.0], dtype=torch.float64)
    key = torch.tensor([0.5, math.sqrt(0.75)], dtype=torch.float64)
    hits, draws = 0, 600
    for seed in range(draws):
        policy = MagicPIG(bits=2, tables=5, seed=seed)
        hits += int((policy.hashes(q) == policy.hashes(key)).sum()) >= 2
    once = (2 / 3) ** 2
    expected = 1 - (1 - once) ** 5 - 5 * once * (1 - once) ** 4
    assert float(policy.probability(torch.tensor(0.5, dtype=torch.float64))) == pytest.approx(expected)
    assert hits / draws == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_long_text_in_a_padded_batch(dtype: torch.dtype) -> None:
    """Tables that took the tail in several times, sequences of different lengths: each reads what it reads alone."""
    policy = MagicPIG(bits=2, tables=5, sinks=1, local=3, dense_layers=())
    q, k, v = (x.to(dtype) for x in inputs(4, 2, 90))
    sizes, padding = [20] + [1] * 70, 7
    present = torch.ones(2, 20, dtype=torch.bool)
    present[1, :padding] = False
    layer, alone = CachedAttention(policy), CachedAttention(policy)
    pieces = list(zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True))
    out = [layer(*part, present=None if number else present) for number, part in enumerate(pieces)]
    for number, part in enumerate(pieces):
        own = alone(*(x[1:, :, 0 if number else padding :] for x in part))
        together = out[number][1:, :, 0 if number else padding :]
        torch.testing.assert_close(together, own, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)
    kept = layer.kept.derived["hash tables"].tensors
    assert kept["slots"].shape[3] > 21
    assert kept["filled"].tolist() != [[0, 0], [0, 0]]


def test_bytes_of_the_tables_are_held_and_let_go() -> None:
    """Two bytes for each slot in each table, two for where a bucket begins; gone once slots move."""
    q, k, v = inputs(2, 1, 40)
    layer = CachedAttention(MagicPIG(bits=3, tables=4, dense_layers=()))
    layer(*(x[:, :, :39] for x in (q, k, v)))
    before = layer.nbytes
    layer(*(x[:, :, 39:] for x in (q, k, v)))
    tables = 2 * 4 * (40 + 2**3 + 1) * 2
    assert layer.nbytes - before == tables + 2 * (8 + 40) * 8 + 2 * 8  # mean and norms in fp64, what is in the tail
    layer.kept.crop(1)
    layer(*(x[:, :, 39:] for x in (q, k, v)))
    assert layer.nbytes - before == tables + 2 * (8 + 40) * 8 + 2 * 8


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="bits=16: expected 0 to 15"):
        MagicPIG(bits=16)
    with pytest.raises(ValueError, match="tables=1: expected at least 2"):
        MagicPIG(tables=1)
    with pytest.raises(ValueError, match="sinks=-1: expected at least 0 tokens"):
        MagicPIG(sinks=-1)
    with pytest.raises(ValueError, match="local=0: expected at least 1 token"):
        MagicPIG(local=0)
    with pytest.raises(ValueError, match=r"dense_layers=\(-1,\): expected layers from 0"):
        MagicPIG(dense_layers=(-1,))
