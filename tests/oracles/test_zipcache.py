"""ZipCache against plain loops, one head, one token and one channel at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.zipcache import ZipCache

pytestmark = pytest.mark.quick


def through_codes(numbers: list[float], bits: int) -> list[float]:
    """Asymmetric quantisation and back."""
    low, high = min(numbers), max(numbers)
    scale = (high - low) / (2**bits - 1)
    return [low + round((x - low) / scale) * scale for x in numbers] if scale > 0 else numbers


def pack(k: Tensor, v: Tensor, rows: list[int], bits: int) -> None:
    """Keys by channel; values by token, each channel divided by the root of its largest size. In place."""
    for c in range(k.shape[1]):
        for j, x in zip(rows, through_codes([float(k[j, c]) for j in rows], bits), strict=True):
            k[j, c] = x
    norms = [math.sqrt(max(abs(float(v[j, c])) for j in rows)) for c in range(v.shape[1])]
    for j in rows:
        new = through_codes([float(v[j, c]) / norms[c] for c in range(v.shape[1])], bits)
        for c, x in enumerate(new):
            v[j, c] = x * norms[c]


def oracle(q: Tensor, k: Tensor, v: Tensor, chunks: list[int], block: int, salient: int) -> tuple[Tensor, list]:
    """With the last query of each call with several tokens, or of a block when decoding, as its only probe."""
    batch, heads, tokens, dim = q.shape
    share = heads // k.shape[1]
    k, v, out = k.clone(), v.clone(), torch.zeros(batch, heads, tokens, v.shape[3], dtype=q.dtype)
    chosen = []
    for b in range(batch):
        for g in range(k.shape[1]):
            attention, probes = [0.0] * tokens, [0] * tokens
            start = packed = 0
            for size in chunks:
                end = start + size
                for i in range(start, end):
                    probe = i == end - 1 and (size > 1 or end - packed == block)
                    for h in range(g * share, (g + 1) * share):
                        terms = [math.exp(float(q[b, h, i] @ k[b, g, j]) / math.sqrt(dim)) for j in range(i + 1)]
                        for j, term in enumerate(terms):
                            out[b, h, i] += term / sum(terms) * v[b, g, j]
                            attention[j] += term / sum(terms) if probe else 0.0
                    for j in range(i + 1):
                        probes[j] += probe
                count = (end - packed) // block
                rows = list(range(packed, packed + count * block))
                order = sorted(rows, key=lambda j: -attention[j] / max(probes[j], 1))
                kinds = sorted(order[: count * salient]), sorted(order[count * salient :])
                for kind, bits, group in zip(kinds, (4, 2), (salient, block - salient), strict=True):
                    for first in range(0, len(kind), group):
                        pack(k[b, g], v[b, g], kind[first : first + group], bits)
                packed += count * block
                start = end
                chosen += [(b, g, j) for j in kinds[0]]
    return out, chosen


def inputs(batch: int, heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, 8), (batch, groups, tokens, 8), (batch, groups, tokens, 12))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("heads", "groups", "chunks", "block", "salient"),
    [
        (2, 2, [1] * 13, 5, 3),
        (4, 2, [13, 1, 1, 1, 5, 1], 4, 1),
        (2, 1, [9, 6, 1, 1], 6, 4),
        (2, 2, [7, 1, 1], 20, 12),
    ],
)
def test_matches_the_oracle(heads: int, groups: int, chunks: list[int], block: int, salient: int) -> None:
    q, k, v = inputs(2, heads, groups, sum(chunks))
    expected, chosen = oracle(q, k, v, chunks, block, salient)
    policy = ZipCache(block=block, salient=salient / block, recent_probes=0.0, random_probes=0.0)
    layer = CachedAttention(policy)
    parts = zip(q.split(chunks, 2), k.split(chunks, 2), v.split(chunks, 2), strict=True)
    out = torch.cat([layer(*part) for part in parts], 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=3e-6)  # scales are kept in fp32
    table = layer.kept.packed[0].table
    found = {
        (b, g, int(j))
        for b, g, row in (torch.arange(table.longest) < table.lengths[..., None]).nonzero().tolist()
        for j in table.parts["position"][table.table[b, g, row], 0]
    }
    assert found == set(chosen)


def test_by_hand() -> None:
    """Of four tokens the last query looks at token 2 alone, so it is salient and comes back in 8 bits."""
    k = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    k[0, 0, 2, 0] = 2000.0
    q = torch.ones_like(k)
    v = torch.tensor([[0.0, 0.1, 0.3, 1.0]], dtype=torch.float64).expand(4, 4)[None, None]
    layer = CachedAttention(ZipCache(bits=2, salient_bits=8, salient=0.25, block=4))
    layer(q, k, v)
    salient, others = layer.kept.packed
    assert salient.table.parts["position"][salient.table.table[0, 0, 0], 0].tolist() == [2]
    assert others.table.parts["position"][others.table.table[0, 0, 0], 0].tolist() == [0, 1, 3]
    assert layer.kept.lengths.tolist() == [[0]]
    out = layer(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    torch.testing.assert_close(out.flatten(), v[0, 0, 0], rtol=0, atol=0.01)


def test_probes_of_a_prompt_and_of_a_block() -> None:
    """In a prompt those from `int(0.95 n)` on, as in the authors' code; while decoding the last 5 of a block of 100."""
    q, k, v = inputs(1, 1, 1, 50)
    policy = ZipCache(random_probes=0.0)
    store = policy.store()
    store.append(k, v)
    assert policy._probes(q, store).nonzero()[:, 1].tolist() == [47, 48, 49]
    probes = []
    for length in range(51, 101):
        store.append(k[:, :, :1], v[:, :, :1])
        probes += [length] * int(policy._probes(q[:, :, :1], store).sum())
    assert probes == [96, 97, 98, 99, 100]


def test_bytes_fall() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 400, 64).to(torch.bfloat16)
    layer = CachedAttention(ZipCache())
    layer(q, k, v)
    assert layer.kept.tokens == 2 * 400
    assert layer.nbytes < 2 * 400 * 128 * 2 * 0.4


def test_bad_settings() -> None:
    for settings, message in (
        ({"bits": 3}, "bits=3: expected 2, 4 or 8"),
        ({"salient_bits": 16}, "salient_bits=16: expected 2, 4 or 8"),
        ({"block": 1}, "block=1: expected at least 2 tokens"),
        ({"salient": 1.5}, r"salient=1.5: expected a share in \[0, 1\]"),
        ({"salient": 1.0}, "salient=1.0: expected at least one token of block=100, not all"),
        ({"random_probes": -0.1}, r"random_probes=-0.1: expected a share in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ZipCache(**settings)
