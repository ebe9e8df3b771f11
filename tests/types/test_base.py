"""`Geometry` and `TokenIndex`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.types import Geometry, Kind, Pattern, TokenIndex

pytestmark = pytest.mark.quick

SMALL = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def lists(draw) -> TokenIndex:
    queries, keys, group = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), -(-queries // group), keys)
    order = torch.rand(shape, generator=generator).argsort(-1)[..., : draw(st.integers(0, keys))]
    order = torch.where(torch.rand(order.shape, generator=generator) < 0.3, -1, order)
    return TokenIndex(order, queries, keys, group, draw(st.booleans()))


def dense(index: TokenIndex) -> torch.Tensor:
    """Slot by slot."""
    batch, heads, groups, _ = index.indices.shape
    mask = torch.zeros(batch, heads, index.queries, index.keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(index.queries):
                for j in index.indices[b, h, i // index.group].tolist():
                    if j >= 0 and (not index.causal or j <= i + index.keys - index.queries):
                        mask[b, h, i, j] = True
    return mask


class TestTokenIndex:
    @SMALL
    @given(lists())
    def test_to_dense(self, index):
        index.validate()
        assert torch.equal(index.to_dense(), dense(index))

    @SMALL
    @given(lists())
    def test_density(self, index):
        assert index.density() == pytest.approx(float(dense(index).double().mean()))

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("group", [1, 2, 5, 20])
    @pytest.mark.parametrize(("queries", "keys"), [(7, 7), (4, 9), (9, 4)])
    def test_density_over_the_grid_of_cases(self, queries, keys, group, causal):
        shape = (2, 3, -(-queries // group), keys)
        order = torch.rand(shape, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :3]
        index = TokenIndex(order.where(order != 1, -1), queries, keys, group, causal)
        assert torch.equal(index.to_dense(), dense(index))
        assert index.density() == pytest.approx(float(dense(index).double().mean()))

    def test_density_of_nothing(self):
        assert TokenIndex(torch.zeros(1, 1, 0, 3, dtype=torch.int64), 0, 5).density() == 0.0

    @pytest.mark.parametrize(
        ("indices", "group", "message"),
        [
            (torch.zeros(1, 1, 4, 2).long(), 0, "group=0: expected at least 1"),
            (torch.zeros(1, 4, 2).long(), 1, r"indices of shape \(1, 4, 2\): expected \[B or 1, H or 1, 4, K\]"),
            (torch.zeros(1, 1, 4, 2).long(), 3, r"\(1, 1, 4, 2\): expected .* 2, K\] for 4 queries in groups of 3"),
            (torch.zeros(1, 1, 4, 2).int(), 1, "indices of dtype torch.int32: expected torch.int64"),
        ],
    )
    def test_bad_shapes_are_refused(self, indices, group, message):
        with pytest.raises(ValueError, match=message):
            TokenIndex(indices, 4, 5, group)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ([0, 5], r"indices in \[0, 5\]: expected -1 or positions in \[0, 5\)"),
            ([-2, 1], r"indices in \[-2, 1\]: expected -1 or positions in \[0, 5\)"),
            ([3, -1, 3], "indices: key 3 appears twice in one list"),
        ],
    )
    def test_bad_contents_fail_validation(self, row, message):
        index = TokenIndex(torch.tensor([[[row]]]), 1, 5)
        with pytest.raises(ValueError, match=message):
            index.validate()

    def test_good_contents_pass_validation(self):
        TokenIndex(torch.tensor([[[[4, -1, 0, -1]]]]), 1, 5).validate()
        TokenIndex(torch.zeros(1, 1, 1, 0, dtype=torch.int64), 1, 5).validate()


class TestGeometry:
    def test_grid(self):
        assert Geometry(grid=(2, 3, 4)).grid_tokens == 24
        assert Geometry().grid_tokens is None

    def test_replace(self):
        assert Geometry(causal=True).replace(causal=False, grid=(4,)) == Geometry(grid=(4,))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"grid": (2, 0)}, r"grid=\(2, 0\): expected one to three sizes, each at least 1"),
            ({"grid": (1, 1, 1, 1)}, r"grid=\(1, 1, 1, 1\): expected one to three sizes"),
            ({"grid": ()}, r"grid=\(\): expected one to three sizes"),
            ({"grid": (2,), "prefix": -1}, "prefix=-1, suffix=0: expected counts of at least 0"),
            ({"suffix": 1}, "prefix=0, suffix=1: only meaningful together with grid"),
            ({"q_segments": torch.zeros(1, 4)}, "q_segments and kv_segments: expected both or neither"),
        ],
    )
    def test_bad_values_are_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Geometry(**changes)


def test_enums_read_as_text():
    assert Pattern("causal-self") is Pattern.CAUSAL_SELF
    assert f"{Kind.CACHE_POLICY}" == "cache-policy"
