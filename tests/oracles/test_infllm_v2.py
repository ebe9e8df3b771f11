"""InfLLM-V2 against the two stages of the paper, query by query."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where.infllm_v2 import InfLLMV2
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def random_qkv(batch: int, heads: int, groups: int, queries: int, keys: int, dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = ((batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim + 1))
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def chosen_blocks(queries: Tensor, k: Tensor, place: int, m: InfLLMV2) -> set[int]:
    """For the queries `[share, D]` of one group at `place`."""
    own = place // m.block
    if place + 1 <= m.dense_below:
        return set(range(own + 1))
    starts = [w for w in range(0, len(k), m.stride) if w + m.kernel - 1 <= place]
    total = dict.fromkeys(starts, 0.0)
    for q in queries:
        weights = [math.exp(float(q @ k[w : w + m.kernel].mean(0)) / math.sqrt(len(q))) for w in starts]
        for w, weight in zip(starts, weights, strict=True):
            total[w] += weight / sum(weights)
    always = {c for c in range(own + 1) if c < m.init_blocks or c >= own - m.local_blocks}
    scores = {}
    for c in set(range(own + 1)) - always:
        first, last = c * m.block, (c + 1) * m.block - 1
        scores[c] = max(total[w] for w in starts if w <= last and w + m.kernel - 1 >= first)
    more = max(m.topk - len(always), 0)
    return always | set(sorted(scores, key=lambda c: -scores[c])[:more])


def oracle_mask(q: Tensor, k: Tensor, m: InfLLMV2) -> Tensor:
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    share = heads // groups
    mask = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for g in range(groups):
            for i in range(queries):
                place = i + keys - queries
                for c in chosen_blocks(q[b, g * share : (g + 1) * share, i], k[b, g], place, m):
                    mask[b, g * share : (g + 1) * share, i, c * m.block : min((c + 1) * m.block, place + 1)] = True
    return mask


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 4, 2, 50, 50), {"block": 8, "kernel": 4, "stride": 2, "topk": 4, "local_blocks": 1, "dense_below": 0}),
        ((1, 4, 1, 61, 61), {"block": 4, "kernel": 4, "stride": 2, "topk": 6, "local_blocks": 2, "dense_below": 30}),
        ((1, 2, 2, 37, 37), {"block": 6, "kernel": 6, "stride": 6, "topk": 3, "local_blocks": 0, "dense_below": 0}),
        ((1, 4, 2, 11, 45), {"block": 4, "kernel": 6, "stride": 2, "topk": 5, "local_blocks": 1, "dense_below": 8}),
        ((1, 2, 1, 1, 33), {"block": 4, "kernel": 2, "stride": 1, "topk": 4, "local_blocks": 1, "dense_below": 0}),
        ((1, 2, 1, 40, 40), {"block": 4, "kernel": 4, "stride": 4, "topk": 2, "local_blocks": 4, "dense_below": 0}),
        ((1, 2, 1, 20, 20), {"block": 8, "kernel": 8, "stride": 4, "topk": 2, "local_blocks": 0, "dense_below": 32}),
    ],
)
def test_paper_form(shape: tuple[int, ...], settings: dict[str, int]) -> None:
    q, k, v = random_qkv(*shape)
    m = InfLLMV2(**settings, tile=16)
    mask = oracle_mask(q, k, m)
    layout = m.pattern(q, k, CAUSAL)
    layout.validate()
    assert torch.equal(layout.to_dense().expand(mask.shape), mask)
    torch.testing.assert_close(m(q, k, v, geometry=CAUSAL), attention(q, k, v, mask), atol=1e-10, rtol=0)


def test_known_by_hand() -> None:
    """Blocks of 2: query 9 has block 4 (its own) and 0 (the first), and likes the mean of keys 4 and 5: block 2."""
    k = torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0, 3.0, 1.0, 1.0, 0.0, 0.0]).view(1, 1, 10, 1)
    m = InfLLMV2(block=2, kernel=2, stride=2, topk=3, local_blocks=0, dense_below=0, tile=4)
    mask = m.pattern(torch.ones(1, 1, 10, 1), k, CAUSAL).to_dense()[0, 0].int()
    assert "".join(str(int(x)) for x in mask[9]) == "1100110011"
    assert "".join(str(int(x)) for x in mask[7]) == "1100111100"


def test_work_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = random_qkv(1, 4, 2, 60, 60)
    m = InfLLMV2(block=8, kernel=4, stride=2, topk=4, local_blocks=1, dense_below=0)
    whole = m.pattern(q, k, CAUSAL).to_dense()
    monkeypatch.setattr("saccade.mechanisms.where.infllm_v2.CHUNK_SCORES", 1)
    assert torch.equal(m.pattern(q, k, CAUSAL).to_dense(), whole)


@pytest.mark.parametrize("dense_below", [0, 17])
def test_token_by_token_equals_whole(dense_below: int) -> None:
    """Also across the switch: the cache grows past dense_below."""
    q, k, v = random_qkv(1, 4, 2, 40, 40)
    m = InfLLMV2(block=4, kernel=4, stride=2, topk=3, local_blocks=1, dense_below=dense_below, tile=16)
    whole = m(q, k, v, geometry=CAUSAL)
    for end in range(1, 41):
        step = m(q[:, :, end - 1 : end], k[:, :, :end], v[:, :, :end], geometry=CAUSAL)
        torch.testing.assert_close(step, whole[:, :, end - 1 : end], atol=1e-10, rtol=0)


def test_later_keys_do_not_steer_the_choice() -> None:
    q, k, _ = random_qkv(1, 2, 2, 64, 64)
    changed = k.clone()
    changed[:, :, 41:] = float("nan")
    m = InfLLMV2(block=8, kernel=4, stride=2, topk=3, local_blocks=0, dense_below=0)
    before, after = (m.pattern(q, x, CAUSAL).to_dense()[:, :, :41] for x in (k, changed))
    assert torch.equal(before, after)


def test_heads_of_a_group_share_their_choice() -> None:
    q, k, _ = random_qkv(1, 4, 2, 48, 48)
    m = InfLLMV2(block=4, kernel=4, stride=2, topk=4, local_blocks=0, dense_below=0)
    mask = m.pattern(q, k, CAUSAL).to_dense()
    assert torch.equal(mask[:, 0], mask[:, 1])
    assert torch.equal(mask[:, 2], mask[:, 3])
    assert not torch.equal(mask[:, 0], mask[:, 2])


def test_short_contexts_are_dense() -> None:
    q, k, _ = random_qkv(1, 2, 1, 50, 50)
    assert InfLLMV2().pattern(q, k, CAUSAL).density(causal=True) == 1.0


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 8)])
@pytest.mark.parametrize("dense_below", [0, 64])
def test_no_tokens(queries: int, keys: int, dense_below: int) -> None:
    q, k, v = random_qkv(1, 2, 1, queries, keys)
    assert InfLLMV2(dense_below=dense_below)(q, k, v, geometry=CAUSAL).shape == (1, 2, queries, 9)


@pytest.mark.parametrize("tokens", [64, 256])
def test_ladder_rises(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens, tokens)
    kept = [InfLLMV2(**s).pattern(q, k, CAUSAL).density(causal=True) for s in InfLLMV2.card.ladder(tokens)]
    assert all(low <= high for low, high in zip(kept, kept[1:], strict=False))
    assert kept[0] < kept[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, "stride=0: expected at least 1 token"),
        ({"block": 40}, "block=40: expected a positive multiple of stride=16"),
        ({"kernel": 24}, "kernel=24: expected a multiple of stride=16 up to 80"),
        ({"kernel": 96}, "kernel=96: expected a multiple of stride=16 up to 80"),
        ({"topk": 0}, "topk=0: expected at least 1 block"),
        ({"init_blocks": -1}, "init_blocks=-1: expected at least 0 blocks"),
        ({"local_blocks": -1}, "local_blocks=-1: expected at least 0 blocks"),
        ({"dense_below": -1}, "dense_below=-1: expected at least 0 tokens"),
        ({"tile": 0}, "tile=0: expected at least 1 query"),
    ],
)
def test_bad_setting(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfLLMV2(**settings)
