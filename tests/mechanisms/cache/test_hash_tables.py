"""Hash tables find what a comparison of all codes finds, however their slots came in, and say what they read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.cache import _hash_tables
from saccade.mechanisms.cache._hash_tables import build, extend, hashed, merge, met, tables_of
from saccade.mechanisms.cache.base import Step

pytestmark = pytest.mark.quick

TABLES, SHARE = 7, 3


def drawn(count: int, buckets: int, heads: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, buckets, (2, heads, count, TABLES), generator=generator).to(torch.int16)


def compared(codes: Tensor, lengths: Tensor, asked: Tensor) -> Tensor:
    """Bool `[B, H, n]` by comparing all codes, head after head."""
    out = torch.zeros(2, asked.shape[1], codes.shape[2], dtype=torch.bool)
    for b in range(2):
        for h in range(asked.shape[1]):
            g = h // SHARE
            same = (codes[b, g, : lengths[b, g]] == asked[b, h]).sum(-1)
            out[b, h, : lengths[b, g]] = same >= 2
    return out


@pytest.mark.parametrize("held", [1, 2**22])
@pytest.mark.parametrize("tail", [0, 2, 10**9])
@pytest.mark.parametrize("buckets", [1, 4, 64])
def test_finds_what_all_codes_compared_do(monkeypatch: pytest.MonkeyPatch, buckets: int, tail: int, held: int) -> None:
    """Heads of different lengths, slots that come one by one, several at once, to some heads only; in parts."""
    monkeypatch.setattr(_hash_tables, "TAIL", tail)
    monkeypatch.setattr(_hash_tables, "SCORE_ELEMENTS", held)
    codes = drawn(60, buckets)
    asked = drawn(2 * SHARE, buckets, 1)[:, 0]
    counts = (
        [torch.tensor([[21, 4], [9, 0]])] + [torch.tensor([[1, 1], [1, 1]])] * 8 + [torch.tensor([[30, 2], [0, 7]])]
    )
    kept, before = tables_of(codes[:, :, :21], counts[0], buckets), counts[0]
    sizes = set()
    for more in counts[1:]:
        number = (before[..., None] + torch.arange(int(more.max()))).clamp(max=59)
        kept |= extend(kept, codes.gather(2, number[..., None].expand(*number.shape, TABLES)), more)
        before = before + more
        assert torch.equal(hashed(kept), before)
        found = met(kept, asked, 60, Step())
        assert torch.equal(found, compared(codes, before, asked))
        sizes.add(kept["slots"].shape[3])
    assert max(sizes) == (21 if tail == 10**9 else 59)  # at the end all were taken in, or none


@pytest.mark.parametrize("sizes", [(5, 3), (1, 30), (32_767, 1), (32_760, 20)])
def test_merged_tables_are_those_of_all_slots(sizes: tuple[int, int]) -> None:
    """To the slot and to the bit; where numbers outgrow 16 bits, too."""
    codes = drawn(sum(sizes), 16)
    lengths = [torch.tensor([[n, n], [n, n]]) for n in sizes]
    parts = [build(x, n, 16) for x, n in zip(codes.split(sizes, 2), lengths, strict=True)]
    merged, whole = merge(*parts), build(codes, lengths[0] + lengths[1], 16)
    for name, x in whole.items():
        assert x.dtype == (torch.int16 if sum(sizes) < 2**15 else torch.int32)
        assert torch.equal(merged[name], x), name


def test_buckets_hold_their_slots() -> None:
    codes, lengths = drawn(40, 8), torch.tensor([[40, 11], [0, 3]])
    tables = build(codes, lengths, 8)
    for b, g, t, bucket in ((b, g, t, c) for b in range(2) for g in range(2) for t in range(TABLES) for c in range(8)):
        start, stop = tables["starts"][b, g, t, bucket : bucket + 2].tolist()
        expected = [j for j in range(int(lengths[b, g])) if codes[b, g, j, t] == bucket]
        assert tables["slots"][b, g, t, start:stop].tolist() == expected


def test_what_is_read_is_told() -> None:
    """Two bounds a table, 2 bytes each; 2 bytes for a slot in a bucket looked up, and for a code of the tail."""
    codes, asked = drawn(30, 4), drawn(2 * SHARE, 4, 1)[:, 0]
    lengths = torch.tensor([[20, 8], [0, 17]])
    kept = tables_of(codes[:, :, :20], lengths, 4)
    kept |= extend(kept, codes[:, :, 20:22], torch.tensor([[2, 2], [1, 0]]))
    looked_up = sum(
        int((codes[b, h // SHARE, : lengths[b, h // SHARE]] == asked[b, h]).sum()) for b in range(2) for h in range(6)
    )
    step = Step()
    met(kept, asked, 30, step)
    assert step.choosing == 2 * looked_up + 2 * 2 * asked.numel() + 2 * TABLES * 5
