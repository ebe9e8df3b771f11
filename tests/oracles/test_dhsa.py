"""DHSA against the paper: boundaries one by one, chunks as lists, keys of a query block by sorting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where import _boundaries
from saccade.mechanisms.where._boundaries import BoundaryPredictor, boundary_ratios, pick_boundaries
from saccade.mechanisms.where.dhsa import DHSA
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def random_qkv(batch: int, heads: int, groups: int, tokens: int, dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, dim), (batch, groups, tokens, dim), (batch, groups, tokens, dim + 1))
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def greedy(scores: list[float], count: int, theta: float, apart: int) -> list[int]:
    picked: list[int] = []
    for place in sorted(range(len(scores)), key=lambda t: -scores[t]):
        if len(picked) < count and scores[place] > theta and all(abs(place - other) > apart for other in picked):
            picked.append(place)
    return sorted(picked)


def logit(p: BoundaryPredictor, k: Tensor, place: int) -> float:
    """For one item, k `[G, N, D]`."""
    tokens = k.shape[1]
    rows = [k[:, t].flatten() if 0 <= t < tokens else torch.zeros(p.channels, dtype=k.dtype)
            for t in range(place - p.window + 1, place + p.window + 1)]  # fmt: skip
    x = torch.stack(rows)
    weight, bias = p.attention.in_proj_weight, p.attention.in_proj_bias
    q, key, v = (x @ w.T + b for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True))
    size = p.channels // p.attention.num_heads
    heads = [slice(h * size, (h + 1) * size) for h in range(p.attention.num_heads)]
    mixed = torch.cat([(q[:, s] @ key[:, s].T / math.sqrt(size)).softmax(1) @ v[:, s] for s in heads], 1)
    mixed = mixed @ p.attention.out_proj.weight.T + p.attention.out_proj.bias
    mixed = (mixed - mixed.mean(1, keepdim=True)) / (mixed.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    mixed = mixed * p.norm.weight + p.norm.bias
    left, right = mixed[: p.window].mean(0), mixed[p.window :].mean(0)
    cosine = (left @ right / (left.norm() * right.norm()))[None]
    features = torch.cat([left, right, (left - right).abs(), left * right, cosine])
    hidden = (p.mlp[0].weight @ features + p.mlp[0].bias).clamp(min=0)
    return float(p.mlp[2].weight @ hidden + p.mlp[2].bias)


def oracle_chunks(k: Tensor, m: DHSA) -> list[range]:
    """Chunks of one item, k `[G, N, D]`."""
    tokens = k.shape[1]
    if m.predictor is None:
        number = [t * m.chunks_per_block // m.block for t in range(tokens)]
        borders = [t for t in range(1, tokens) if number[t] != number[t - 1]]
    else:
        w = m.predictor.window
        logits = [logit(m.predictor, k, t) if w - 1 <= t < tokens - w else -math.inf for t in range(tokens)]
        borders = [t + 1 for t in greedy(logits, tokens // m.block * m.chunks_per_block, m.theta, m.apart)]
    edges = [0, *borders, tokens]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def oracle_mask(q: Tensor, k: Tensor, m: DHSA) -> Tensor:
    """For one item: q `[H, N, D]`, k `[G, N, D]`; `[N, N]` for all heads."""
    tokens = k.shape[1]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    mean_q, mean_k = q.mean(0), k.mean(0)
    chunks = oracle_chunks(k, m)
    for start in range(0, tokens, m.block):
        stop = min(start + m.block, tokens)
        query = mean_q[start:stop].mean(0)
        score = {}
        for chunk in chunks:
            value = math.sqrt(len(chunk)) * float(query @ mean_k[chunk.start : chunk.stop].mean(0))
            score.update(dict.fromkeys(chunk, value))
        recent = list(range(max(stop - m.local, 0), stop))
        rest = sorted((j for j in range(stop) if j not in recent), key=lambda j: -score[j])
        for j in recent + rest[: m.budget - len(recent)]:
            for i in range(max(start, j), stop):
                mask[i, j] = True
    return mask


def build_predictor(channels: int, window: int) -> BoundaryPredictor:
    torch.manual_seed(0)
    return BoundaryPredictor(channels, window=window, hidden=12, heads=2).double()


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 4, 2, 48), {"budget": 14, "local": 5, "block": 8, "chunks_per_block": 2, "apart": 1}),
        ((1, 3, 1, 37), {"budget": 9, "local": 0, "block": 5, "chunks_per_block": 2, "apart": 0}),
        ((1, 2, 2, 21), {"budget": 20, "local": 20, "block": 8, "chunks_per_block": 3, "apart": 3}),
        ((1, 2, 1, 30), {"budget": 30, "local": 4, "block": 4, "chunks_per_block": 1, "apart": 2}),
    ],
)
def test_paper_form(shape: tuple[int, ...], settings: dict[str, int], predicted: bool) -> None:
    q, k, v = random_qkv(*shape)
    predictor = build_predictor(8 * shape[2], 3) if predicted else None
    m = DHSA(**settings, theta=-0.2, predictor=predictor)
    with torch.no_grad():
        mask = torch.stack([oracle_mask(q[b], k[b], m) for b in range(shape[0])])[:, None]
    chosen = m.pattern(q, k, CAUSAL)
    chosen.validate()
    assert torch.equal(chosen.to_dense(), mask)
    torch.testing.assert_close(m(q, k, v, geometry=CAUSAL), attention(q, k, v, mask), atol=1e-10, rtol=0)


def test_predicted_boundaries_are_among_the_cases() -> None:
    _, k, _ = random_qkv(2, 4, 2, 48)
    m = DHSA(budget=14, local=5, block=8, chunks_per_block=2, apart=1, theta=-0.2, predictor=build_predictor(16, 3))
    with torch.no_grad():
        chunks = [oracle_chunks(item, m) for item in k]
    assert len({len(chunk) for chunk in chunks[0]}) > 2
    assert int(m.chunks(k).max()) + 1 == max(map(len, chunks))


def test_known_by_hand() -> None:
    """Chunks (0, 1) and (2, 3) before block (4, 5): 2 * sqrt 2 beats 1 * sqrt 2, and one key more is the next best."""
    k = torch.tensor([1.0, 1.0, 2.0, 2.0, 0.0, 0.0]).view(1, 1, 6, 1)
    m = DHSA(budget=5, local=2, block=2, chunks_per_block=1)
    mask = m.pattern(torch.ones(1, 1, 6, 1), k, CAUSAL).to_dense()[0, 0].int()
    assert ["".join(str(int(x)) for x in row) for row in mask[4:]] == ["101110", "101111"]


@pytest.mark.parametrize("apart", [0, 1, 4])
@pytest.mark.parametrize("count", [0, 3, 100])
def test_suppression_is_the_greedy_one(count: int, apart: int) -> None:
    generator = torch.Generator().manual_seed(apart)
    scores = torch.randn(3, 60, generator=generator)
    scores[1] = torch.arange(60.0)  # the worst order for suppression at once
    scores[2, 20:30] = 1.5  # ties
    picked = pick_boundaries(scores, count, 0.1, apart)
    for row in range(3):
        expected = greedy(scores[row].tolist(), count, 0.1, apart)
        assert picked[row].nonzero()[:, 0].tolist() == expected


def test_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_boundaries, "CHUNK_SCORES", 200)
    q, k, _ = random_qkv(2, 4, 2, 20)
    keys = k.repeat_interleave(2, 1)
    scores = (q @ keys.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(20, 20).triu(1).bool(), -math.inf)
    weights, window = scores.softmax(-1).mean(1), 3
    got = boundary_ratios(q, k, window)
    for b in range(2):
        for t in range(20):
            expected = 0.0
            if window - 1 <= t < 20 - window:
                rows = weights[b, t + window :]
                past = float(rows[:, t - window + 1 : t + 1].sum()) + 1e-6
                future = float(rows[:, t + 1 : t + window + 1].sum()) + 1e-6
                expected = max(past / future, future / past)
            assert float(got[b, t]) == pytest.approx(expected, rel=1e-9)


def test_a_predictor_learns_where_subjects_change() -> None:
    """Passages of random lengths with keys of their own: after training, boundaries are found on new passages."""
    generator = torch.Generator().manual_seed(0)

    def passages() -> tuple[Tensor, Tensor]:
        ends = torch.rand(4, 96, generator=generator) < 0.1
        number = (ends.cumsum(-1) - ends.long()).clamp(max=15)
        subjects = torch.randn(4, 16, 8, generator=generator)
        k = subjects.gather(1, number[..., None].expand(-1, -1, 8)) + 0.3 * torch.randn(4, 96, 8, generator=generator)
        return k[:, None], number

    torch.manual_seed(0)
    predictor = BoundaryPredictor(8, window=2, hidden=16, heads=2)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=3e-3)
    for _ in range(150):
        k, number = passages()
        target = (number[:, 1:] != number[:, :-1]).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(predictor(k)[:, :-1], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    k, number = passages()
    m = DHSA(budget=16, local=8, block=16, chunks_per_block=2, theta=0.0, apart=1, predictor=predictor)
    found = m.chunks(k).diff(dim=-1) != 0
    real = number.diff(dim=-1) != 0
    assert float((found & real).sum() / found.sum()) > 0.8
    assert float((found & real).sum() / real.sum()) > 0.5


def test_only_whole_prompts() -> None:
    q, k, v = random_qkv(1, 2, 1, 32)
    message = "8 queries and 32 keys: expected as many, dhsa is for prefill only: boundaries are the best of a whole"
    with pytest.raises(ValueError, match=message):
        DHSA()(q[:, :, -8:], k, v, geometry=CAUSAL)


def test_no_tokens() -> None:
    q, k, v = random_qkv(1, 2, 1, 0)
    assert DHSA()(q, k, v, geometry=CAUSAL).shape == (1, 2, 0, 9)


@pytest.mark.parametrize("tokens", [64, 256])
def test_ladder_rises(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens)
    kept = [DHSA(**s).pattern(q, k, CAUSAL).density() for s in DHSA.card.ladder(tokens)]
    assert all(low < high for low, high in zip(kept, kept[1:], strict=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget=0: expected at least 1 key"),
        ({"local": 2000}, "local=2000: expected from 0 to budget=1024 keys"),
        ({"block": 0}, "block=0: expected at least 1 query"),
        ({"chunks_per_block": 0}, "chunks_per_block=0: expected from 1 to block=64"),
        ({"apart": -1}, "apart=-1: expected at least 0 tokens"),
    ],
)
def test_bad_setting(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DHSA(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "heads=3: expected a divisor of channels=16"),
        ({"window": 0}, "window=0: expected at least 1 token"),
        ({"hidden": 0}, "hidden=0: expected at least 1 channel"),
    ],
)
def test_bad_predictor(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoundaryPredictor(16, **settings)
    with pytest.raises(ValueError, match=r"k of shape \(1, 2, 5, 4\): expected heads times dim to be channels=16"):
        BoundaryPredictor(16)(torch.zeros(1, 2, 5, 4))
