"""`BlockLayout` against the same operations on dense bool masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from saccade.types import BlockLayout, Geometry
from saccade.types.layout_algebra import take_query_blocks

pytestmark = pytest.mark.quick

SMALL = settings(max_examples=40, deadline=None, derandomize=True)
SIZES = st.tuples(st.integers(1, 13), st.integers(1, 13))
BLOCKS = st.tuples(st.integers(1, 5), st.integers(1, 5))
SIDE = st.integers(-1, 9)


@st.composite
def masks(draw, sizes: tuple[int, int] | None = None) -> torch.Tensor:
    """Bool `[B, H, M, N]` that mixes empty, full and ragged stretches."""
    queries, keys = sizes if sizes is not None else draw(SIZES)
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    fine = torch.rand(batch, heads, queries, keys, generator=generator) < density
    coarse = torch.rand(batch, heads, -(-queries // 3), -(-keys // 3), generator=generator)
    coarse = coarse.repeat_interleave(3, 2).repeat_interleave(3, 3)[..., :queries, :keys]
    return (fine & (coarse > 0.3)) | (coarse > 0.8)


@st.composite
def two_masks(draw) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = draw(SIZES)
    first, second = draw(masks(sizes)), draw(masks(sizes))
    return first[:, :1], second[:1] if len(first) > 1 else second


def distances(queries: int, keys: int) -> torch.Tensor:
    """Place of query i minus j, `[M, N]`."""
    return torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)


def band(queries: int, keys: int, left: int, right: int) -> torch.Tensor:
    distance = distances(queries, keys)
    mask = torch.ones_like(distance, dtype=torch.bool)
    mask = mask & (distance <= left) if left >= 0 else mask
    return mask & (distance >= -right) if right >= 0 else mask


class TestRoundTrip:
    @SMALL
    @given(masks(), BLOCKS)
    def test_dense(self, mask, block):
        layout = BlockLayout.from_dense(mask, block)
        layout.validate()
        assert torch.equal(layout.to_dense(), mask)

    @SMALL
    @given(masks(), BLOCKS)
    def test_stores_no_empty_block_and_no_pattern_twice(self, mask, block):
        layout = BlockLayout.from_dense(mask, block)
        entries = layout.entry_mask(torch.arange(len(layout.indices)))
        assert bool(entries.flatten(1).any(1).all())
        assert len(torch.unique(layout.bits, dim=0)) == len(layout.bits)
        blocks = layout.block_mask().repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)
        assert not bool((mask & ~blocks[..., : mask.shape[2], : mask.shape[3]]).any())

    def test_two_dimensional_mask(self):
        mask = band(5, 7, 2, 1)
        assert torch.equal(BlockLayout.from_dense(mask, 2).to_dense(), mask[None, None])

    @SMALL
    @given(masks(), BLOCKS)
    def test_counts_and_density(self, mask, block):
        layout = BlockLayout.from_dense(mask, block)
        assert torch.equal(layout.pairs(), mask.sum((2, 3)))
        assert torch.equal(layout.counts, layout.block_mask().sum(-1))
        assert layout.density() == pytest.approx(float(mask.double().mean()))
        torch.testing.assert_close(layout.density_per_head(), mask.double().mean((2, 3)))

    def test_causal_density_counts_visible_pairs_only(self):
        layout = BlockLayout.window(6, 9, -1, 0, block=4)
        assert layout.density(causal=True) == 1.0
        assert layout.density() == pytest.approx(float(band(6, 9, -1, 0).double().mean()))
        assert BlockLayout.window(9, 6, 0, 0, block=4).density(causal=True) == pytest.approx(6 / 21)


class TestAlgebra:
    @SMALL
    @given(two_masks(), BLOCKS)
    def test_union_and_intersection(self, pair, block):
        first, second = (BlockLayout.from_dense(mask, block) for mask in pair)
        for result, expected in ((first | second, pair[0] | pair[1]), (first & second, pair[0] & pair[1])):
            result.validate()
            assert torch.equal(result.to_dense(), expected)

    @SMALL
    @given(masks(), BLOCKS)
    def test_idempotence_and_several_operands(self, mask, block):
        layout = BlockLayout.from_dense(mask, block)
        dense = BlockLayout.dense(mask.shape[2], mask.shape[3], block=block)
        assert torch.equal(layout.union(layout, layout).to_dense(), mask)
        assert torch.equal(layout.intersection(dense, layout).to_dense(), mask)
        assert (layout | dense).density() == 1.0

    @SMALL
    @given(masks(), BLOCKS)
    def test_transpose(self, mask, block):
        flipped = BlockLayout.from_dense(mask, block).transpose()
        flipped.validate()
        assert torch.equal(flipped.to_dense(), mask.transpose(2, 3))
        assert flipped.block == (block[1], block[0])
        assert torch.equal(flipped.transpose().to_dense(), mask)

    def test_expand(self):
        mask = band(5, 7, 2, 1)
        expanded = BlockLayout.from_dense(mask, 2).expand(2, 3)
        expanded.validate()
        assert torch.equal(expanded.to_dense(), mask.expand(2, 3, -1, -1))
        with pytest.raises(ValueError, match="batch=4, heads=3: cannot expand a layout of 2 x 3"):
            expanded.expand(4, 3)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (BlockLayout.dense(6, 6, block=2), "queries=6: expected 5"),
            (BlockLayout.dense(5, 7, block=2), "keys=7: expected 6"),
            (BlockLayout.dense(5, 6, block=3), r"block=\(3, 3\): expected \(2, 2\)"),
        ],
    )
    def test_different_sizes_are_refused(self, other, message):
        with pytest.raises(ValueError, match=message):
            BlockLayout.dense(5, 6, block=2) | other


class TestWithin:
    @SMALL
    @given(masks(), BLOCKS)
    def test_causal(self, mask, block):
        layout = BlockLayout.from_dense(mask, block).within(Geometry(causal=True))
        layout.validate()
        assert torch.equal(layout.to_dense(), mask & band(mask.shape[2], mask.shape[3], -1, 0))

    @SMALL
    @given(masks(), BLOCKS, st.integers(0, 99), st.booleans(), st.integers(1, 2))
    def test_segments(self, mask, block, seed, causal, batch):
        generator = torch.Generator().manual_seed(seed)
        rows = batch if mask.shape[0] == 1 else mask.shape[0]
        q_ids = torch.randint(-1, 3, (rows, mask.shape[2]), generator=generator).sort(-1).values
        kv_ids = torch.randint(-1, 3, (1, mask.shape[3]), generator=generator).sort(-1).values
        geometry = Geometry(causal=causal, q_segments=q_ids, kv_segments=kv_ids)
        layout = BlockLayout.from_dense(mask, block).within(geometry)
        layout.validate()
        same = (q_ids[:, None, :, None] == kv_ids[:, None, None, :]) & (q_ids >= 0)[:, None, :, None]
        allowed = same & band(mask.shape[2], mask.shape[3], -1, 0) if causal else same
        assert torch.equal(layout.to_dense(), mask & allowed)

    def test_nothing_to_cut(self):
        layout = BlockLayout.dense(5, 5, block=2)
        assert layout.within(Geometry()) is layout


class TestBuilders:
    @SMALL
    @given(SIZES, BLOCKS, SIDE, SIDE)
    def test_window(self, sizes, block, left, right):
        layout = BlockLayout.window(*sizes, left, right, block=block)
        layout.validate()
        assert torch.equal(layout.to_dense()[0, 0], band(*sizes, left, right))

    def test_window_of_a_million_tokens_has_few_entries(self):
        layout = BlockLayout.window(2**20, 2**20, 127, 0, block=64)
        assert len(layout.indices) == 3 * 2**14 - 3
        assert len(layout.bits) == 2
        assert int(layout.pairs()) == 128 * 2**20 - 127 * 64

    @SMALL
    @given(SIZES, BLOCKS, st.data())
    def test_tokens(self, sizes, block, data):
        queries, keys = sizes
        chosen_k = torch.tensor(data.draw(st.lists(st.integers(0, keys - 1))), dtype=torch.int64)
        chosen_q = torch.tensor(data.draw(st.lists(st.integers(0, queries - 1))), dtype=torch.int64)
        layout = BlockLayout.tokens(queries, keys, key_tokens=chosen_k, query_tokens=chosen_q, block=block)
        layout.validate()
        expected = torch.zeros(queries, keys, dtype=torch.bool)
        expected[:, chosen_k] = True
        expected[chosen_q] = True
        assert torch.equal(layout.to_dense()[0, 0], expected)

    @SMALL
    @given(SIZES, BLOCKS, st.integers(1, 6), st.data())
    def test_stride(self, sizes, block, step, data):
        offset = data.draw(st.integers(0, step - 1))
        layout = BlockLayout.stride(*sizes, step, offset=offset, block=block)
        expected = (torch.arange(sizes[1]) % step == offset).expand(sizes)
        assert torch.equal(layout.to_dense()[0, 0], expected)

    def test_indices_in_any_order(self):
        indices = torch.tensor([[[[2, 0], [1, -1], [0, 2]]]])
        layout = BlockLayout.from_indices(indices, 5, 6, 2)
        layout.validate()
        expected = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
        assert torch.equal(layout.block_mask()[0, 0], expected)
        assert torch.equal(layout.to_dense()[0, 0], expected.repeat_interleave(2, 0).repeat_interleave(2, 1)[:5])
        some = BlockLayout.from_indices(indices, 5, 6, 2, valid=indices != 2)
        assert torch.equal(some.block_mask()[0, 0, :, 2], torch.zeros(3, dtype=torch.bool))

    def test_block_mask(self):
        blocks = torch.rand(2, 1, 3, 2, generator=torch.Generator().manual_seed(0)) < 0.5
        layout = BlockLayout.from_block_mask(blocks, 2, 4, queries=5, keys=7)
        layout.validate()
        assert torch.equal(layout.block_mask(), blocks)
        assert torch.equal(
            layout.to_dense(), blocks.repeat_interleave(2, 2).repeat_interleave(4, 3)[:, :, :5, :7]
        )  # fmt: skip

    @SMALL
    @given(masks(), BLOCKS, st.integers(0, 99))
    def test_mask_mod_on_candidates(self, mask, block, seed):
        batch, heads, queries, keys = mask.shape
        allowed = torch.rand(queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.7
        layout = BlockLayout.from_mask_mod(
            lambda b, h, i, j: mask[b, h, i, j], queries, keys, batch=batch, heads=heads, block=block,
            candidates=BlockLayout.from_dense(allowed, block),
        )  # fmt: skip
        layout.validate()
        assert torch.equal(layout.to_dense(), mask & allowed)

    @pytest.mark.parametrize(("queries", "keys"), [(256, 384), (200, 300)])
    def test_flex_attention_block_mask(self, queries, keys):
        offset = keys - queries

        def mod(b, h, i, j):
            return (j <= i + offset) & ((i + offset - j < 60 * (h + 1)) | (j < 3 + b))

        flex = create_block_mask(mod, 2, 2, queries, keys, device="cpu", BLOCK_SIZE=64)
        layout = BlockLayout.from_block_mask(flex)
        layout.validate()
        places = torch.meshgrid(*(torch.arange(size) for size in (2, 2, queries, keys)), indexing="ij")
        assert layout.block == (64, 64)
        assert torch.equal(layout.to_dense(), mod(*places))

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: BlockLayout.window(4, 4, -2, 0), r"window=\(-2, 0\): expected sizes of at least 0"),
            (lambda: BlockLayout.window(-1, 4), r"queries=-1, keys=4: expected counts of at least 0"),
            (lambda: BlockLayout.dense(4, 4, block=0), r"block=0: expected a size of at least 1"),
            (lambda: BlockLayout.from_dense(torch.zeros(4, 4)), r"mask of dtype torch.float32, shape \(4, 4\)"),
            (lambda: BlockLayout.stride(4, 4, 0), r"step=0, offset=0: expected step >= 1"),
            (lambda: BlockLayout.stride(4, 4, 2, offset=2), r"step=2, offset=2: expected step >= 1 and 0 <= offset"),
            (
                lambda: BlockLayout.tokens(4, 4, key_tokens=torch.tensor([4])),
                r"key_tokens in \[4, 4\]: expected \[0, 4\)",
            ),
            (
                lambda: BlockLayout.from_indices(torch.zeros(1, 1, 3, 1).long(), 4, 4, 2),
                r"indices of shape \(1, 1, 3, 1\): expected \[B or 1, H or 1, 2, k\]",
            ),
            (
                lambda: BlockLayout.from_indices(torch.full((1, 1, 2, 1), 2), 4, 4, 2),
                r"indices up to 2: expected key blocks in \[0, 2\)",
            ),
            (lambda: BlockLayout.from_block_mask(torch.zeros(2, 2)), r"mask of dtype torch.float32"),
            (
                lambda: BlockLayout.from_block_mask(torch.ones(2, 2).bool(), 2, 2, 7, 4),
                r"mask of \(2, 2\) blocks: expected \(4, 2\) for queries=7, keys=4, block=\(2, 2\)",
            ),
            (lambda: BlockLayout.from_block_mask("causal"), r"mask of type str: expected a bool tensor or a Flex"),
        ],
    )
    def test_bad_arguments_are_refused(self, build, message):
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": torch.zeros(2, dtype=torch.int64)}, r"indices of dtype torch.int64, shape \(2,\)"),
        ({"kinds": torch.zeros(3, dtype=torch.int32)}, r"kinds of dtype torch.int32, shape \(3,\)"),
        ({"bits": torch.zeros(1, 2, dtype=torch.uint8)}, r"bits of dtype torch.uint8, shape \(1, 2\)"),
        ({"indptr": torch.tensor([0, 3, 2])}, r"indptr: expected to rise from 0 to 2"),
        (
            {"indices": torch.tensor([0, 2], dtype=torch.int32)},
            r"indices: expected key blocks in \[0, 2\), got up to 2",
        ),
        (
            {"kinds": torch.tensor([-1, 1], dtype=torch.int32)},
            r"kinds: expected -1 or a pattern in \[0, 1\), got up to 1",
        ),
        (
            {"indptr": torch.tensor([0, 2, 2]), "indices": torch.tensor([1, 0], dtype=torch.int32)},
            "indices: expected strictly ascending key blocks within each row",
        ),
    ],
)
def test_validate_names_what_is_wrong(changes, message):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()
    layout = BlockLayout.from_dense(mask, 2)
    layout.validate()
    with pytest.raises(ValueError, match=message):
        replace(layout, **changes).validate()


def test_empty_problems():
    for queries, keys in ((0, 5), (5, 0), (0, 0)):
        layout = BlockLayout.window(queries, keys, 2, 0, block=2)
        layout.validate()
        assert layout.to_dense().shape == (1, 1, queries, keys)
        assert layout.density() == 0.0


def test_repr_gives_sizes_not_contents():
    text = repr(BlockLayout.window(8, 8, 1, 0, block=4))
    assert text == "BlockLayout(batch=1, heads=1, queries=8, keys=8, block=(4, 4), entries=3, patterns=2)"


def test_to_another_device_keeps_everything():
    layout = BlockLayout.window(8, 8, 1, 0, block=4)
    assert layout.to("cpu") is layout
    assert layout.to("meta").indptr.device.type == "meta"


def test_some_query_blocks_alone():
    layout = BlockLayout.window(90, 120, 40, 0, block=(16, 32)).expand(2, 3)
    blocks = torch.tensor([1, 2, 5])
    part = take_query_blocks(layout, blocks)
    part.validate()
    tokens = torch.cat([torch.arange(16, 48), torch.arange(80, 90)])
    assert part.queries == 42
    assert torch.equal(part.to_dense(), layout.to_dense()[:, :, tokens])
    assert take_query_blocks(layout, torch.tensor([0, 3])).queries == 32
