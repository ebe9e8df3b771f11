"""`KVPages`: what is stored comes back, and what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saccade.types import KVPages

pytestmark = pytest.mark.quick


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_floats_come_back_exactly_and_share_memory_where_they_can() -> None:
    k, v = draw(2, 3, 10, 8), draw(2, 3, 10, 4, seed=1)
    lengths = torch.tensor([[10, 4, 0], [1, 9, 2]])
    for page in (None, 1, 4, 16):
        cache = KVPages.from_dense(k, v, lengths=lengths, page_size=page)
        there = (torch.arange(10) < lengths[..., None])[..., None]
        for found, given in zip(cache.to_dense(), (k, v), strict=True):
            assert torch.equal(found, given * there)
    cache = KVPages.from_dense(k, v)
    assert cache.k.data_ptr() == k.data_ptr()
    assert cache.nbytes() == 4 * (k.numel() + v.numel())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 4, 2])
@pytest.mark.parametrize("zero_point", [False, True])
def test_codes_come_back_within_half_a_step(bits: int, group: int | None, zero_point: bool) -> None:
    k, v = draw(1, 2, 20, 8) + 3, draw(1, 2, 20, 12, seed=1) * 100
    k[0, 0, 0] = 7.0  # a constant group
    cache = KVPages.from_dense(k, v, page_size=8, bits=bits, group=group, zero_point=zero_point)
    assert cache.bits == bits
    assert cache.dims == (8, 12)
    for found, given, scale in zip(cache.to_dense(), (k, v), (cache.k_scale, cache.v_scale), strict=True):
        groups = given.unflatten(-1, (scale.shape[2], -1))
        extent = groups.amax(-1) - groups.amin(-1) if zero_point else 2 * groups.abs().amax(-1)
        step = extent / (2**bits - 2) + groups.abs().amax(-1) * 2**-20
        error = (found - given).abs().unflatten(-1, (scale.shape[2], -1)).amax(-1)
        assert bool((error <= 0.501 * step + 1e-5 * groups.abs().amax(-1)).all())


def test_codes_by_hand() -> None:
    k = torch.tensor([[[[7.0, -7.0, 1.0, 2.0]]]])
    cache = KVPages.from_dense(k, k, bits=4)
    assert cache.k.tolist() == [[[15 + 16 * 9, 1 + 16 * 10]]]
    assert cache.k_scale.tolist() == [[[1.0]]]
    assert torch.equal(cache.to_dense()[0], k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(4, 8)}, r"k of shape \(4, 8\) and v of shape \(5, 4, 6\): expected \[P, S, D\]"),
        ({"v": torch.zeros(5, 4, 6).half()}, "k and v are torch.float32 and torch.float16: expected one"),
        ({"table": torch.zeros(1, 5).long()}, r"table of shape \(1, 5\) and lengths of shape \(1, 1\)"),
        (
            {"key_table": torch.zeros(2, 1, 5).long()},
            r"key_table of shape \(2, 1, 5\): expected \[B, G, T\] with \(1, 1\)",
        ),
        ({"key_table": torch.zeros(1, 1, 5)}, "key_table of dtype torch.float32: expected torch.int64"),
        ({"lengths": torch.zeros(1, 1)}, "lengths of dtype torch.float32: expected torch.int64"),
        ({"k_scale": torch.zeros(5, 4, 1)}, "k_scale: expected with codes and only then, k is torch.float32"),
        ({"v_zero": torch.zeros(5, 4, 1)}, r"v_zero of shape \(5, 4, 1\) and dtype torch.float32: expected fp32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    cache = KVPages.from_dense(draw(1, 1, 20, 8), draw(1, 1, 20, 6), page_size=4)
    with pytest.raises(ValueError, match=message):
        replace(cache, **change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "bits=3: expected 8 or 4"),
        ({"bits": 8, "group": 3}, "group=3: expected a divisor of the 8 channels"),
        ({"page_size": 0}, "page_size=0: expected at least 1"),
        ({"lengths": torch.tensor([[21]])}, r"lengths in \[21, 21\]: expected \[0, 20\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVPages.from_dense(draw(1, 1, 20, 8), draw(1, 1, 20, 6), **settings)


def test_odd_channels_have_no_codes_of_four_bits() -> None:
    with pytest.raises(ValueError, match="bits=4 with 7 channels: expected an even number"):
        KVPages.from_dense(draw(1, 1, 20, 7), draw(1, 1, 20, 6), bits=4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k \(1, 1, 20, 8\) and v \(1, 1, 19, 8\): expected \[B, G, N, D\]"):
        KVPages.from_dense(draw(1, 1, 20, 8), draw(1, 1, 19, 8))


def test_a_table_of_keys_is_validated_against_their_own_pages() -> None:
    cache = KVPages.from_dense(draw(1, 1, 20, 8), draw(1, 1, 20, 6), page_size=4)
    fewer = replace(cache, k=cache.k[:2], key_table=torch.zeros(1, 1, 5).long())
    fewer.validate()
    torch.testing.assert_close(fewer.to_dense()[0][0, 0, 4:8], cache.k[0])
    with pytest.raises(ValueError, match=r"key_table has page 2: expected pages in \[0, 2\)"):
        replace(fewer, key_table=torch.full((1, 1, 5), 2)).validate()
    with pytest.raises(ValueError, match=r"lengths in \[20, 20\]: expected \[0, 16\], the key_table's room"):
        replace(fewer, key_table=torch.zeros(1, 1, 4).long()).validate()
