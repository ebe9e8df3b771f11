"""Layouts that point outside are refused by name, before anything is read through them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from saccade.kernels import cpu
from saccade.ops import block_attend
from saccade.types import BlockLayout

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ engine: {cpu.missing()}"),
]


def good() -> BlockLayout:
    """Three block rows of three, 40 x 40 tokens in blocks of 16; the diagonal is partial."""
    return BlockLayout.window(40, 40, -1, 0, block=16)


def changed(name: str, place: int, value: int) -> BlockLayout:
    tensor = getattr(good(), name).clone()
    tensor[place] = value
    return replace(good(), **{name: tensor})


def run(layout: BlockLayout) -> torch.Tensor:
    q, k, v = (torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    return block_attend(q, k, v, layout, impl="cpu")


def test_the_good_layout_runs():
    assert len(good().indices) == 6
    assert run(good()).isfinite().all()


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (changed("indices", 2, 3), "layout.indices[2]=3: expected a key block in [0, 3)"),
        (changed("indices", 5, -1), "layout.indices[5]=-1: expected a key block in [0, 3)"),
        (changed("indices", 0, 2**31 - 1), "layout.indices[0]=2147483647: expected a key block in [0, 3)"),
        (changed("kinds", 1, 99), "layout.kinds[1]=99: expected -1 or a pattern in [0, "),
        (changed("kinds", 4, -2), "layout.kinds[4]=-2: expected -1 or a pattern in [0, "),
        (changed("indptr", 0, 1), "layout.indptr[0]=1: expected to rise from 0 to at most 6"),
        (changed("indptr", 3, 7), "layout.indptr[3]=7: expected to rise from 0 to at most 6"),
        (changed("indptr", 2, 0), "layout.indptr[2]=0: expected to rise from 0 to at most 6"),
        (changed("indptr", 1, -(2**40)), f"layout.indptr[1]={-(2**40)}: expected to rise from 0 to at most 6"),
        (
            replace(good(), indices=good().indices.long()),
            "layout.indices of dtype torch.int64, shape (6,) on cpu: expected torch.int32, (6,) on cpu",
        ),
        (
            replace(good(), kinds=good().kinds[:-1]),
            "layout.kinds of dtype torch.int32, shape (5,) on cpu: expected torch.int32, (6,) on cpu",
        ),
        (
            replace(good(), bits=good().bits[:, :-1]),
            "layout.bits of dtype torch.uint8, shape (1, 31) on cpu: expected torch.uint8, (1, 32) on cpu",
        ),
        (
            replace(good(), indptr=good().indptr[:-1]),
            "layout.indptr of dtype torch.int64, shape (3,) on cpu: expected torch.int64, (4,) on cpu",
        ),
    ],
)
def test_what_points_outside_is_refused(layout, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        run(layout)


def test_the_first_of_many_is_named():
    layout = good()
    bad = replace(layout, indices=torch.full_like(layout.indices, 7))
    with pytest.raises(ValueError, match=re.escape("layout.indices[0]=7")):
        run(bad)
