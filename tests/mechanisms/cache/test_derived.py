"""What reading policies share: lists in order, scores of summaries, and bounds that grow with the store."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.cache._derived import LONG, highest, page_bounds, scores
from saccade.mechanisms.cache.base import Step
from saccade.mechanisms.cache.store import KVStore


@pytest.mark.parametrize("count", [1, 3, LONG, 3 * LONG, 999], ids=lambda count: f"{count} of {3 * LONG}")
@pytest.mark.parametrize("hidden", [0, 5], ids=lambda hidden: f"{hidden} hidden")
def test_the_highest_in_order(count: int, hidden: int) -> None:
    ranks = torch.stack([torch.randperm(3 * LONG).float() for _ in range(6)]).view(2, 3, -1)
    ranks[1, 2, :hidden] = -torch.inf
    index = highest(ranks, count, 3 * LONG)
    index.validate()
    for entry in range(2):
        for row in range(3):
            seen = [slot for slot in index.indices[entry, row, 0].tolist() if slot >= 0]
            found = sorted(range(3 * LONG), key=lambda j, r=ranks[entry, row]: -float(r[j]))  # type: ignore[misc]
            visible = [slot for slot in found if ranks[entry, row, slot] > -torch.inf]
            assert seen == sorted(visible[:count])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_of_rows_with_room_behind_them(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1, 16, generator=generator).to(dtype)
    room = torch.randn(2, 2, 60, 16, generator=generator).to(dtype)
    lengths = torch.tensor([[50, 7], [0, 33]])
    found = scores(q, room[:, :, :50], lengths)
    expected = torch.einsum("bgsd,bgnd->bgsn", q[:, :, 0].unflatten(1, (2, 2)).double(), room[:, :, :50].double())
    expected = expected.masked_fill(torch.arange(50) >= lengths[:, :, None, None], -torch.inf).flatten(1, 2)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-4)
    assert bool(scores(q, room).isfinite().all())


def test_bounds_grow_as_if_made_anew() -> None:
    """Padding makes sequences, and eviction heads, of different lengths; some calls bring several pages."""
    generator = torch.Generator().manual_seed(1)
    store, step, size = KVStore(), Step(), 4
    for number, tokens in enumerate((9, 1, 1, 7, 1, 13, 2)):
        k = torch.randn(2, 2, tokens, 3, generator=generator)
        present = torch.ones(2, tokens, dtype=torch.bool)
        present[1, : tokens // 2] = False
        store.append(k, k, present)
        low, high = page_bounds(store, size, step)
        assert low.shape == high.shape == (2, 2, -(-len(store) // size), 3)
        for entry in range(2):
            for head in range(2):
                keys = store.keys[entry, head, : int(store.lengths[entry, head])]
                for page, part in enumerate(keys.split(size)):
                    assert torch.equal(low[entry, head, page], part.amin(0))
                    assert torch.equal(high[entry, head, page], part.amax(0))
        if number == 3:  # head 1 keeps every second token: what was known of it is not looked at again
            keep = store.present.clone()
            keep[:, 1, ::2] = False
            store.evict(keep)
