"""What the block selectors share, against loops over tokens."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where._blocks import block_visibility, head_scores, key_lists, largest, mean_pool


@pytest.mark.parametrize(("tokens", "size"), [(12, 4), (13, 4), (3, 8), (7, 1)])
def test_mean_pool(tokens: int, size: int) -> None:
    x = torch.randn(2, 3, tokens, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([x[:, :, i : i + size].mean(2) for i in range(0, tokens, size)], 2)
    torch.testing.assert_close(mean_pool(x, size), expected)


def test_mean_pool_accumulates_in_fp32() -> None:
    assert mean_pool(torch.ones(1, 1, 8, 2, dtype=torch.bfloat16), 4).dtype == torch.float32


def test_head_scores_share_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 5, 4, generator=generator), torch.randn(2, 3, 7, 4, generator=generator)
    expected = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1))
    torch.testing.assert_close(head_scores(q, k), expected)


@pytest.mark.parametrize(
    ("queries", "keys", "block"), [(16, 16, (4, 4)), (13, 13, (6, 4)), (5, 21, (4, 3)), (9, 4, (2, 3))]
)
def test_causal_visibility(queries: int, keys: int, block: tuple[int, int]) -> None:
    past, edge = block_visibility(queries, keys, block, causal=True, device=torch.device("cpu"))
    for i in range(past.shape[0]):
        places = [m + keys - queries for m in range(i * block[0], min((i + 1) * block[0], queries))]
        for j in range(past.shape[1]):
            tokens = range(j * block[1], min((j + 1) * block[1], keys))
            assert bool(past[i, j]) == (max(tokens) < min(places))
            assert bool(edge[i, j]) == (min(tokens) <= max(places) and max(tokens) >= min(places))


def test_everything_is_past_without_causality() -> None:
    past, edge = block_visibility(9, 4, (2, 3), causal=False, device=torch.device("cpu"))
    assert bool(past.all())
    assert not bool(edge.any())


def test_key_lists() -> None:
    kept = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool).view(1, 1, 3, 3)
    assert key_lists(kept).tolist() == [[[[1, 2], [-1, -1], [0, -1]]]]
    assert key_lists(kept[:, :, :0]).shape == (1, 1, 0, 0)
    assert key_lists(kept[..., :0]).shape == (1, 1, 3, 0)


@pytest.mark.parametrize(("count", "expected"), [(0, "00000"), (1, "01000"), (2, "01010"), (4, "11110"), (9, "11111")])
def test_largest_takes_the_first_of_those_that_tie(count: int, expected: str) -> None:
    x = torch.tensor([2.0, 5.0, 2.0, 5.0, 1.0])
    assert "".join(str(int(kept)) for kept in largest(x, count)) == expected
