"""What the static patterns share."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where._static import first_tokens, from_position_blocks, places, query_block_positions
from saccade.types import Geometry


def test_places_count_within_runs_of_equal_ids():
    ids = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 2, 2, -1]])
    found = places(Geometry(q_segments=ids, kv_segments=ids), 7, ids.device)
    assert found.tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 1, 0]]
    assert places(Geometry(), 3, ids.device).tolist() == [[0, 1, 2]]
    assert places(Geometry(), 0, ids.device).shape == (1, 0)


def test_first_tokens_of_each_sequence():
    ids = torch.tensor([[0, 0, 0, 1, 1], [-1, 0, 0, 0, 0]])
    layout = first_tokens(1, 5, 5, Geometry(q_segments=ids, kv_segments=ids), 2, ids.device)
    layout.validate()
    mask = layout.to_dense()[:, 0].int().tolist()
    assert mask[0] == [[1, 0, 0, 0, 0]] * 3 + [[0, 0, 0, 1, 0]] * 2
    assert mask[1] == [[0, 0, 0, 0, 0]] + [[0, 1, 0, 0, 0]] * 4


@pytest.mark.parametrize("keys", [1, 8, 15, 24])
@pytest.mark.parametrize("block", [1, 4, 7])
def test_blocks_of_positions_stay_where_the_positions_are(keys, block):
    """With any number of queries over a cache, the rows are the last rows of the whole pattern."""
    generator = torch.Generator().manual_seed(0)
    count = -(-keys // block)
    wanted = torch.rand(2, count, count, generator=generator) < 0.5
    lists = torch.where(wanted, torch.arange(count), -1)[None]
    whole = wanted.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :keys, :keys]
    for queries in range(keys + 1):
        rows = query_block_positions(queries, keys, block, lists.device)
        layout = from_position_blocks(lists[:, :, rows], queries, keys, block)
        layout.validate()
        assert torch.equal(layout.to_dense()[0], whole[:, keys - queries :]), queries
