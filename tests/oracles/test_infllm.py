"""InfLLM against loops over tokens, blocks and heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache.attention import CachedAttention
from saccade.mechanisms.cache.base import Step, compose
from saccade.mechanisms.cache.infllm import InfLLM
from saccade.mechanisms.cache.sink_recent import SinkRecent


def relevance(q: Tensor, key: Tensor, m: int, local: int) -> float:
    """Of token m with this key, for the queries `[S, T, D]` of the heads that share it."""
    return sum(float(query @ key) for row in q for query in row[m + 1 : m + 1 + local]) / local


def chosen_by(q: Tensor, k: Tensor, policy: InfLLM) -> list[int]:
    """Tokens that the last of the queries `[H, T, D]` read of keys `[G, T, D]`."""
    heads, total, _ = q.shape
    share, start, blocks = heads // len(k), policy.sinks, []
    while start + policy.block + policy.local <= total - 1:
        blocks.append(list(range(start, start + policy.block)))
        start += policy.block
    similarity = []
    for members in blocks:
        score = 0.0
        for g in range(len(k)):
            asking = q[g * share : (g + 1) * share]
            ranks = [relevance(asking, k[g, m], m, policy.local) for m in members]
            best = sorted(range(len(members)), key=lambda i: -ranks[i])[: policy.representatives]
            centre = sum(k[g, members[i]] for i in best) / len(best)
            score += sum(float(row[-1] @ centre) for row in asking)
        similarity.append(score)
    read = sorted(range(len(blocks)), key=lambda i: -similarity[i])[: policy.blocks]
    return sorted({*range(min(policy.sinks, total)), *(j for i in read for j in blocks[i]), *range(start, total)})


def oracle(q: Tensor, k: Tensor, v: Tensor, prompt: int, policy: InfLLM) -> tuple[Tensor, list[int]]:
    """Outputs, and how many tokens each decoded one reads."""
    batch, heads, total, dim = q.shape
    share, counts = heads // k.shape[1], []
    out = torch.zeros(batch, heads, total, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        counts = []
        for i in range(total):
            seen = list(range(i + 1)) if i < prompt else chosen_by(q[b, :, : i + 1], k[b, :, : i + 1], policy)
            counts += [len(seen)] * (i >= prompt)
            for h in range(heads):
                weights = (k[b, h // share, seen] @ q[b, h, i] / math.sqrt(dim)).softmax(0)
                out[b, h, i] = weights @ v[b, h // share, seen]
    return out, counts


def inputs(heads: int, groups: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, heads, tokens, 8), (2, groups, tokens, 8), (2, groups, tokens, 5))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def steps(policy, q: Tensor, k: Tensor, v: Tensor, sizes: list[int]) -> tuple[Tensor, CachedAttention, list[int]]:
    layer, outputs, read = CachedAttention(policy), [], []
    for part in zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True):
        outputs.append(layer(*part))
        read.append(layer.bytes_read)
    return torch.cat(outputs, 2), layer, read


CASES = [
    (4, 2, InfLLM(blocks=2, block=3, representatives=2, sinks=2, local=5), 16),
    (2, 2, InfLLM(blocks=1, block=4, representatives=1, sinks=0, local=1), 9),
    (3, 1, InfLLM(blocks=3, block=2, representatives=2, sinks=3, local=4), 20),
    (2, 1, InfLLM(blocks=2, block=1, representatives=1, sinks=1, local=7), 3),
]


@pytest.mark.parametrize(("heads", "groups", "policy", "prompt"), CASES)
def test_matches_the_oracle(heads: int, groups: int, policy: InfLLM, prompt: int) -> None:
    q, k, v = inputs(heads, groups, 30)
    out, layer, _ = steps(policy, q, k, v, [prompt] + [1] * (30 - prompt))
    expected, counts = oracle(q, k, v, prompt, policy)
    assert counts[-1] < 30
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert layer.kept.complete


@pytest.mark.parametrize(("heads", "groups", "policy", "prompt"), CASES[:2])
def test_a_prompt_in_chunks_equals_one_fed_whole(heads: int, groups: int, policy: InfLLM, prompt: int) -> None:
    q, k, v = inputs(heads, groups, 28)
    whole, _, _ = steps(policy, q, k, v, [24, 1, 1, 1, 1])
    chunks, layer, _ = steps(policy, q, k, v, [7, 12, 5, 1, 1, 1, 1])
    torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-12)
    one, _, _ = steps(policy, q[:1], k[:1], v[:1], [24, 1, 1, 1, 1])
    torch.testing.assert_close(one, whole[:1], rtol=0, atol=1e-12)


def test_bytes_of_a_step() -> None:
    q, k, v = inputs(4, 2, 30)
    policy = InfLLM(blocks=2, block=3, representatives=2, sinks=2, local=5)
    _, counts = oracle(q, k, v, 28, policy)
    _, layer, read = steps(policy, q, k, v, [28, 1, 1])
    key, token, lists, blocks = 8 * 8, (8 + 5) * 8, 2 * 2, (30 - 1 - 5 - 2) // 3
    again = lists * (5 + 1) * key  # relevance of the window, the new token included
    assert read[2] == lists * (counts[1] * token + blocks * key) + again


def test_left_padded_equals_alone() -> None:
    q, k, v = inputs(2, 1, 30)
    present = torch.ones(2, 20, dtype=torch.bool)
    present[1, :7] = False
    policy = InfLLM(blocks=1, block=3, representatives=2, sinks=1, local=4)
    padded, alone = CachedAttention(policy), CachedAttention(policy)
    padded(*(x[:, :, :20] for x in (q, k, v)), present=present)
    alone(*(x[1:, :, 7:20] for x in (q, k, v)))
    for i in range(20, 30):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        torch.testing.assert_close(padded(*token)[1:], alone(*(x[1:] for x in token)), rtol=0, atol=1e-12)


def test_beside_eviction() -> None:
    """With room for all blocks of what is kept, the same as eviction alone; below it, something is left out."""
    q, k, v = inputs(2, 2, 26)
    keep, sizes = SinkRecent(sinks=2, recent=14), [5] + [1] * 21
    expected, alone, _ = steps(keep, q, k, v, sizes)
    settings = {"block": 2, "representatives": 1, "sinks": 1, "local": 3}
    out, layer, _ = steps(compose(keep=keep, read=InfLLM(blocks=9, **settings)), q, k, v, sizes)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    less, layer, read = steps(compose(keep=keep, read=InfLLM(blocks=1, **settings)), q, k, v, sizes)
    assert len(layer.kept) == len(alone.kept)
    assert not torch.allclose(less[:, :, -1], expected[:, :, -1])


def test_by_hand() -> None:
    """Block {1, 2}: token 2 is what the next query wants, so it stands for the block; block {3, 4} scores lower."""
    k = torch.tensor([[0.0, 0], [0, 3], [4, 0], [1, 0], [0, 1], [0, 0], [0, 0]], dtype=torch.float64).view(1, 1, 7, 2)
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(1, 1, 7, 2)
    policy = InfLLM(blocks=1, block=2, representatives=1, sinks=1, local=1)
    layer = CachedAttention(policy)
    layer(q, k, k)
    assert layer.kept.stat("relevance").flatten().tolist() == [0, 0, 4, 1, 0, 0, 0]
    index = policy.select(q[:, :, :1], layer.kept, Step())
    assert [j for j in index.indices.flatten().tolist() if j >= 0] == [0, 1, 2, 5, 6]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="blocks=0: expected at least 1 block"):
        InfLLM(blocks=0)
    with pytest.raises(ValueError, match="block=0: expected at least 1 token"):
        InfLLM(block=0)
    with pytest.raises(ValueError, match="representatives=5: expected 1 to block=4 tokens"):
        InfLLM(block=4, representatives=5)
    with pytest.raises(ValueError, match="sinks=-1: expected at least 0 tokens"):
        InfLLM(sinks=-1)
    with pytest.raises(ValueError, match="local=0: expected at least 1 token"):
        InfLLM(local=0)
    with pytest.raises(ValueError, match="dense_layers=-1: expected at least 0 layers"):
        InfLLM(dense_layers=-1)
