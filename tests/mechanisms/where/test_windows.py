"""Cutting feature maps into windows and back, and which places of a window see each other."""

from __future__ import annotations

import pytest
import torch

from saccade.mechanisms.where._windows import Partition, attend_windows, check_map, relative_index

CASES = [
    Partition((6, 8), (3, 4)),
    Partition((6, 8), (3, 4), (1, 2)),
    Partition((7, 5), (3, 4), (2, 1)),
    Partition((6, 8), (3, 4), dilated=True),
    Partition((7, 5), (3, 4), dilated=True),
    Partition((1, 9), (1, 4)),
    Partition((7, 5), (3, 4), before=(1, 2)),
]


@pytest.mark.parametrize("partition", CASES)
def test_join_undoes_split(partition):
    x = torch.randn(2, 3, *partition.grid)
    windows = partition.split(x)
    assert windows.shape == (2 * partition.counts[0] * partition.counts[1], 3, *partition.window)
    assert torch.equal(partition.join(windows), x)


@pytest.mark.parametrize("partition", CASES)
def test_places_see_the_window_they_lie_in_before_the_shift(partition):
    """Two places of one window see each other exactly if neither is padding and their distance fits the window."""
    rows, columns = torch.meshgrid(*map(torch.arange, partition.grid), indexing="ij")
    places = partition.split(torch.stack([rows, columns, torch.ones_like(rows)])[None].float()).flatten(2)
    segments = partition.segments(2, torch.device("cpu"))
    if segments is None:
        segments = torch.zeros(2 * len(places), places.shape[2])
    assert torch.equal(segments[: len(places)], segments[len(places) :])
    assert torch.equal(segments[: len(places)] >= 0, places[:, 2] > 0)
    if partition.dilated:
        return
    for (row, column, real), ids in zip(places, segments, strict=False):
        for i in range(len(ids)):
            for j in range(len(ids)):
                near = abs(row[i] - row[j]) < partition.window[0] and abs(column[i] - column[j]) < partition.window[1]
                if real[i] and real[j]:
                    assert bool(near) == bool(ids[i] == ids[j])


def test_attention_stays_inside_windows():
    torch.manual_seed(0)
    windows = torch.randn(5, 12, 2, 3)
    q, k, v = windows.flatten(2).mT.chunk(3, 2)
    expected = [torch.softmax(a @ b.T / 2, 1) @ c for a, b, c in zip(q, k, v, strict=True)]
    got = attend_windows(windows, 1, None, None)
    torch.testing.assert_close(got.flatten(2).mT, torch.stack(expected))


def test_relative_index_names_the_offset_of_each_pair():
    table = torch.tensor([[10 * row + column for column in range(-3, 4)] for row in range(-2, 3)]).flatten()
    offsets = table[relative_index((2, 3), (3, 4), torch.device("cpu"))]
    assert offsets[0].tolist() == [0, -1, -2, -10, -11, -12]
    assert offsets[5].tolist() == [12, 11, 10, 2, 1, 0]


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 5, 5), (2, 3, 0, 5)])
def test_refuses_what_is_no_feature_map(shape):
    with pytest.raises(ValueError, match=r"x of shape .*: expected a feature map \[B, 3, height, width\]"):
        check_map(torch.zeros(shape), 3)
