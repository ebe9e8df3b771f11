"""Boxes: the pairs they stand for, in every form, and what is refused."""

from __future__ import annotations

import pytest
import torch

from saccade.types import BlockLayout, Boxes, TokenIndex


def boxes(first, last, sizes, dilation, **options):
    return Boxes(torch.tensor(first).int(), torch.tensor(last).int(), sizes, dilation, **options)


LINE = ([0, 0, 1, 2, 3], [1, 2, 3, 4, 4])
PLANE = ([0, 0, 1, 0, 1, 0, 1], [1, 2, 2, 2, 3, 2, 3])
"""Three rows, and four columns of dilation 2."""


def test_known_pairs():
    mask = boxes(*LINE, (5,), (1,)).to_dense()[0, 0].int().tolist()
    assert mask == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_axes_multiply():
    mask = boxes(*PLANE, (3, 4), (1, 2)).to_dense()[0, 0]
    rows = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    columns = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]] * 2)
    assert torch.equal(mask, torch.kron(rows, columns).bool())


@pytest.mark.parametrize(("pattern", "sizes", "dilation"), [(LINE, (5,), (1,)), (PLANE, (3, 4), (1, 2))])
def test_every_form_holds_the_same_pairs(pattern, sizes, dilation):
    whole = boxes(*pattern, sizes, dilation, block=2)
    whole.validate()
    dense = whole.to_dense()
    assert torch.equal(whole.to_index().to_dense(), dense)
    assert torch.equal(whole.to_layout().to_dense(), dense)
    assert whole.density() == pytest.approx(float(dense.double().mean()))
    assert (whole.queries, whole.keys) == dense.shape[2:]


def test_the_cheaper_form_is_kept():
    tight = boxes(list(range(64)), list(range(64)), (64,), (1,), block=64)
    assert isinstance(tight.portable(), TokenIndex)
    assert tight.portable() is tight.portable()
    wide = boxes([0] * 64, [63] * 64, (64,), (1,), block=64)
    assert isinstance(wide.portable(), BlockLayout)


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ([0, 0, -1], [1, 2, 2], r"axis 0: window -1 \.\. 2 of coordinate 2"),
        ([0, 0, 1], [1, 2, 3], r"axis 0: window 1 \.\. 3 of coordinate 2: expected one within 0 \.\. 2"),
        ([0, 0, 2], [1, 2, 1], r"axis 0: window 2 \.\. 1 of coordinate 2"),
        ([0, 1, 0], [2, 2, 2], "axis 0: expected windows whose ends rise"),
    ],
)
def test_validate_refuses(first, last, message):
    with pytest.raises(ValueError, match=message):
        boxes(first, last, (3,), (1,)).validate()


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"sizes=\(1, 1, 1, 1\): expected one to three"):
        boxes([0] * 4, [0] * 4, (1, 1, 1, 1), (1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"dilation=\(1, 0\): expected one for each of sizes=\(2, 2\)"):
        boxes([0] * 4, [0] * 4, (2, 2), (1, 0))
    with pytest.raises(
        ValueError, match=r"last of dtype torch.int32, shape \(3,\) on cpu: expected torch.int32, \(4,\)"
    ):
        boxes([0] * 4, [0] * 3, (2, 2), (1, 1))
