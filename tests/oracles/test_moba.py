"""MoBA against equations 3 to 6 of the paper, query by query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where.moba import MoBA
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)


def random_qkv(batch: int, heads: int, groups: int, queries: int, keys: int, dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = ((batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim + 1))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def chosen_chunks(query: Tensor, keys: Tensor, own: int, chunk: int, topk: int) -> list[int]:
    """Own chunk and the topk - 1 of the chunks 0 .. own - 1 with the largest <q, mean(k)>."""
    gates = [float(query @ keys[c * chunk : (c + 1) * chunk].mean(0)) for c in range(own)]
    return [own, *sorted(range(own), key=lambda c: -gates[c])[: topk - 1]]


def oracle_mask(q: Tensor, k: Tensor, chunk: int, topk: int) -> Tensor:
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    mask = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                place = i + keys - queries
                head_keys = k[b, h * groups // heads]
                for c in chosen_chunks(q[b, h, i], head_keys, place // chunk, chunk, topk):
                    mask[b, h, i, c * chunk : min((c + 1) * chunk, place + 1)] = True
    return mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 4, 2, 50, 50), {"chunk": 8, "topk": 3, "tile": 16}),
        ((1, 3, 1, 37, 37), {"chunk": 5, "topk": 2, "tile": 7}),
        ((1, 2, 2, 70, 70), {"chunk": 32, "topk": 2, "tile": 64}),
        ((1, 4, 2, 11, 45), {"chunk": 4, "topk": 4, "tile": 8}),
        ((1, 2, 1, 1, 33), {"chunk": 8, "topk": 2, "tile": 16}),
        ((1, 2, 1, 20, 20), {"chunk": 4, "topk": 1, "tile": 4}),
        ((1, 1, 1, 96, 96), {"chunk": 16, "topk": 9, "tile": 32}),
    ],
)
def test_paper_form(shape: tuple[int, ...], settings: dict[str, int]) -> None:
    q, k, v = random_qkv(*shape)
    mask = oracle_mask(q, k, settings["chunk"], settings["topk"])
    layout = MoBA(**settings).pattern(q, k, CAUSAL)
    layout.validate()
    assert torch.equal(layout.to_dense(), mask)
    torch.testing.assert_close(MoBA(**settings)(q, k, v, geometry=CAUSAL), attention(q, k, v, mask), atol=1e-10, rtol=0)


def test_chunk_that_the_layout_splits_into_narrower_blocks() -> None:
    q, k, _ = random_qkv(1, 2, 1, 300, 300)
    layout = MoBA(chunk=96, topk=2, tile=32).pattern(q, k, CAUSAL)
    assert layout.block == (32, 48)
    assert torch.equal(layout.to_dense(), oracle_mask(q, k, 96, 2))


@pytest.mark.parametrize(("queries", "keys"), [(48, 48), (41, 41), (10, 37)])
def test_shared_choice_is_by_the_mean_gate_of_the_block(queries: int, keys: int) -> None:
    q, k, v = random_qkv(2, 4, 2, queries, keys)
    size, chunk, topk = 12, 4, 3
    mask = torch.zeros(2, 4, queries, keys, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            for start in range(0, queries, size):
                first = start + keys - queries
                rows = range(start, min(start + size, queries))
                head_keys = k[b, h // 2]
                gates = {
                    c: sum(float(q[b, h, i] @ head_keys[c * chunk : (c + 1) * chunk].mean(0)) for i in rows)
                    for c in range(first // chunk)
                }
                best = sorted(gates, key=lambda c: -gates[c])[: topk - 1]
                for i in rows:
                    place = i + keys - queries
                    mask[b, h, i, first // chunk * chunk : place + 1] = True
                    for c in best:
                        mask[b, h, i, c * chunk : (c + 1) * chunk] = True
    mechanism = MoBA(chunk=chunk, topk=topk, query_block=size)
    assert torch.equal(mechanism.pattern(q, k, CAUSAL).to_dense(), mask)
    torch.testing.assert_close(mechanism(q, k, v, geometry=CAUSAL), attention(q, k, v, mask), atol=1e-10, rtol=0)


def test_known_by_hand() -> None:
    """Chunks 0 and 2 point along the query, chunk 1 against it: query 7 of chunk 3 takes the stronger, chunk 2."""
    k = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0, 2.0, 0.0, 0.0]).view(1, 1, 8, 1)
    mask = MoBA(chunk=2, topk=2, tile=4).pattern(torch.ones(1, 1, 8, 1), k, CAUSAL).to_dense()[0, 0]
    expected = ["10000000", "11000000", "11100000", "11110000", "11001000", "11001100", "00001110", "00001111"]
    assert ["".join(str(int(x)) for x in row) for row in mask] == expected


def test_future_chunks_do_not_steer_the_choice() -> None:
    q, k, _ = random_qkv(1, 2, 2, 64, 64)
    changed = k.clone()
    changed[:, :, 40:] = float("nan")
    mechanism = MoBA(chunk=8, topk=3, tile=16)
    before, after = (mechanism.pattern(q, x, CAUSAL).to_dense() for x in (k, changed))
    assert torch.equal(before[:, :, :40], after[:, :, :40])


def test_token_by_token_equals_whole() -> None:
    q, k, v = random_qkv(1, 4, 2, 40, 40)
    mechanism = MoBA(chunk=8, topk=2, tile=16)
    whole = mechanism(q, k, v, geometry=CAUSAL)
    for end in range(1, 41):
        step = mechanism(q[:, :, end - 1 : end], k[:, :, :end], v[:, :, :end], geometry=CAUSAL)
        torch.testing.assert_close(step, whole[:, :, end - 1 : end], atol=1e-10, rtol=0)


@pytest.mark.parametrize("tokens", [30, 64])
def test_exact_setting_is_dense(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens, tokens)
    mechanism = MoBA(**MoBA.card.exact(tokens))
    assert mechanism.pattern(q, k, CAUSAL).density(causal=True) == 1.0


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 8)])
def test_no_tokens(queries: int, keys: int) -> None:
    q, k, v = random_qkv(1, 2, 1, queries, keys)
    out = MoBA()(q, k, v, geometry=CAUSAL)
    assert torch.equal(out, torch.zeros(1, 2, queries, 9, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [64, 256])
def test_ladder_rises(tokens: int) -> None:
    q, k, _ = random_qkv(1, 2, 1, tokens, tokens)
    kept = [MoBA(**s).pattern(q, k, CAUSAL).density(causal=True) for s in MoBA.card.ladder(tokens)]
    assert all(low < high for low, high in zip(kept, kept[1:], strict=False))
    assert 0.05 < kept[0] < kept[-1] < 0.6


@pytest.mark.parametrize("name", ["chunk", "topk", "query_block", "tile"])
def test_bad_setting(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: expected at least 1"):
        MoBA(**{name: 0})


def test_not_causal_is_refused() -> None:
    q, k, v = random_qkv(1, 2, 1, 16, 16)
    with pytest.raises(ValueError, match="causal=False with 16 queries and 16 keys: moba is defined for causal-self"):
        MoBA()(q, k, v)
