"""Selectors for language on q, k, v with sinks, topics and neighbours: better than as many random pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.where.dhsa import DHSA
from saccade.mechanisms.where.flex_prefill import FlexPrefill
from saccade.mechanisms.where.infllm_v2 import InfLLMV2
from saccade.mechanisms.where.minference import MInference
from saccade.mechanisms.where.mtraining_pattern import MTrainingPattern
from saccade.mechanisms.where.pbs_attn import PBSAttn
from saccade.mechanisms.where.sale import SALE
from saccade.types import Geometry

CAUSAL = Geometry(causal=True)
TOKENS, BLOCK = 512, 16

MECHANISMS: list[Any] = [
    DHSA(budget=96, local=32, block=BLOCK, chunks_per_block=2),
    InfLLMV2(block=BLOCK, kernel=8, stride=4, topk=6, local_blocks=1, dense_below=0),
    FlexPrefill(gamma=0.7, tau=0.1, block=BLOCK, min_budget=32),
    FlexPrefill(gamma=0.4, tau=0.9, block=BLOCK, min_budget=32),
    MInference(form="vertical_slash", vertical=60, slash=20, last_queries=32, sinks=2, local=8, block=BLOCK),
    MInference(form="block", topk=6, block=BLOCK),
    MTrainingPattern(vertical=60, slash=20, last_queries=32, sinks=2, local=8, block=BLOCK),
    MTrainingPattern(vertical=60, slash=60, mass=(0.8, 0.3), last_queries=32, block=BLOCK),
    PBSAttn(threshold=0.5, block=BLOCK, segment=2 * BLOCK),
    SALE(threshold=0.2, block_q=BLOCK, block_k=8, local=BLOCK),
]


def structured_qkv() -> tuple[Tensor, ...]:
    """Passages of 24 tokens have topics; queries ask for a topic, for the first token and for their neighbours."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(8, 16, generator=generator)
    passages = torch.randint(8, (2, TOKENS // 24 + 1), generator=generator).repeat_interleave(24, 1)[:, :TOKENS]
    slow = torch.arange(TOKENS)[:, None] * torch.tensor([0.02, 0.05])
    places = 2.5 * torch.cat([slow.cos(), slow.sin()], 1)
    sink = torch.zeros(TOKENS, 1)
    sink[0] = 8.0

    def tokens(heads: int, topic: float, last: Tensor, seed: int) -> Tensor:
        noise = 0.3 * torch.randn(1, heads, TOKENS, 16, generator=torch.Generator().manual_seed(seed))
        about = topic * topics[passages][:, None][:, :, :TOKENS].expand(2, heads, -1, -1)
        return torch.cat([about + noise, (places + last).expand(2, heads, -1, -1)], -1)

    q = torch.cat([tokens(4, 1.0, places * 0, 1), torch.ones(2, 4, TOKENS, 1)], -1)
    k = torch.cat([tokens(2, 1.0, places * 0, 2), sink.expand(2, 2, -1, -1)], -1)
    return q, k, torch.randn(2, 2, TOKENS, 8, generator=generator)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -float("inf"))
    return scores.softmax(-1) @ v


def random_blocks(density: float) -> Tensor:
    """The diagonal and random blocks of the past, of about this density: bool `[2, 4, N, N]`."""
    rows = TOKENS // BLOCK
    past = torch.ones(rows, rows, dtype=torch.bool).tril(-1)
    target = density * TOKENS * (TOKENS + 1) / 2 - rows * BLOCK * (BLOCK + 1) / 2
    share = target / (past.sum() * BLOCK**2)
    drawn = torch.rand(2, 4, rows, rows, generator=torch.Generator().manual_seed(3)) < share
    blocks = (drawn & past) | torch.eye(rows, dtype=torch.bool)
    tokens = blocks.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    return tokens & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=repr)
def test_error_below_that_of_random_blocks_of_the_same_density(mechanism: Any) -> None:
    q, k, v = structured_qkv()
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    dense = attention(q, k, v, causal)
    mask = mechanism.pattern(q, k, CAUSAL).to_dense().expand(2, 4, -1, -1) & causal
    density = float(mask.sum() / (8 * causal.sum()))
    assert 0.02 < density < 0.6
    chance = random_blocks(density)
    assert abs(float(chance.sum() / (8 * causal.sum())) - density) < 0.03
    error, random_error = (float((attention(q, k, v, m) - dense).norm()) for m in (mask, chance))
    assert error < 0.9 * random_error
