"""Packed bit masks: against formulas over single bits, and patterns that a weak hash would mix up."""

from __future__ import annotations

import pytest
import torch

from saccade.types import bits
from saccade.types.bits import any_bits, bit_counts, pack_bits, spread_rows, unique_bits, unique_rows, unpack_bits


def random_masks(count, height, width, density=0.3):
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(0)) < density


@pytest.mark.parametrize("shape", [(5, 8, 8), (3, 3, 5), (1, 1, 1), (4, 2, 4), (0, 4, 4), (2, 64, 64)])
def test_packing_keeps_every_bit_in_its_place(shape):
    mask = random_masks(*shape)
    packed = pack_bits(mask)
    assert packed.shape == (shape[0], -(-shape[1] * shape[2] // 8))
    assert packed.dtype == torch.uint8
    flat = mask.flatten(1).tolist()
    wanted = [
        [sum(row[at + i] << i for i in range(len(row[at : at + 8]))) for at in range(0, len(row), 8)] for row in flat
    ]
    assert packed.tolist() == wanted
    assert torch.equal(unpack_bits(packed, shape[1:]), mask)
    assert torch.equal(bit_counts(packed), mask.flatten(1).sum(1))
    assert torch.equal(any_bits(packed), mask.flatten(1).any(1))


def test_full_words_are_counted():
    packed = torch.full((2, 17), 255, dtype=torch.uint8)
    assert bit_counts(packed).tolist() == [136, 136]


def test_views_are_packed_as_they_are_seen():
    mask = random_masks(6, 8, 9)
    for view in (mask[1:], mask[:, 1:, 1:], mask.mT, mask[::2], mask[:1].expand(3, -1, -1)):
        assert torch.equal(pack_bits(view), pack_bits(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("width", [8, 16, 5])
def test_spread_rows(width):
    kept = random_masks(7, 12, 1)
    assert torch.equal(unpack_bits(spread_rows(pack_bits(kept), 12, width), (12, width)), kept.expand(-1, -1, width))


@pytest.mark.parametrize(
    "masks",
    [
        random_masks(200, 8, 8, 0.1),
        random_masks(300, 16, 1).expand(-1, -1, 64),  # words of nothing but zeros or ones
        torch.eye(64, dtype=torch.bool).view(64, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.bool),
        torch.eye(4096, dtype=torch.bool)[::63].view(-1, 64, 64),  # the highest bits of words among them
    ],
)
def test_equal_rows_are_found_and_no_others(masks):
    packed = pack_bits(torch.cat([masks, masks.flip(0)]))
    distinct, which = unique_rows(packed)
    assert torch.equal(distinct[which], packed)
    assert len(distinct) == len(torch.unique(packed, dim=0))


def test_rows_whose_sums_meet_are_still_told_apart(monkeypatch):
    monkeypatch.setattr(bits, "MIX", 0)
    packed = pack_bits(random_masks(50, 8, 8))
    distinct, which = unique_rows(packed)
    assert len(distinct) == len(torch.unique(packed, dim=0))
    assert torch.equal(distinct[which], packed)


def test_unique_bits_keep_full_blocks_full():
    mask = torch.eye(4, dtype=torch.bool)[None]
    packed, kinds = unique_bits(
        pack_bits(torch.cat([mask, ~mask, mask])), torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    )
    assert len(packed) == 2
    assert kinds.dtype == torch.int32
    assert int(kinds[1]) == -1
    assert torch.equal(unpack_bits(packed[kinds[[0, 2, 3]].long()], (4, 4)), torch.cat([mask, mask, ~mask]))
