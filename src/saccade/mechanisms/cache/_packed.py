"""Tokens packed for good, in groups, beside a store of recent ones: what KIVI and ZipCache share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.mechanisms.cache.arena import Arena
from saccade.mechanisms.cache.pagetable import PageLayout, PageTable
from saccade.mechanisms.cache.saving import TOKENS, Parcel, Table, told
from saccade.mechanisms.cache.storage import Storage
from saccade.mechanisms.cache.store import KVStore
from saccade.ops import attend_groups, merge
from saccade.types import AttentionOutput
from saccade.types.groups import KVGroups, squeeze_codes

PARTS = ("key", "key_scale", "key_low", "value", "value_scale", "value_low", "value_norm")
"""What `KVGroups` has of each group, by name."""


@dataclass(frozen=True)
class Packing:
    """How a group of tokens is packed: x = low + scale * code, codes 0 .. 2^bits - 1.

    A key channel has one scale and low for the group (per-channel quantisation); a value has them for each `channels`
    of its own (per-token quantisation). They are stored in the keys' type where that has 16 bits, else in fp32.

    Args:
        bits: 8, 4 or 2.
        group: Tokens of a group.
        channels: Channels of a value that share a scale, None for all.
        normalise: Divide each value channel by the square root of its largest size in the group, kept beside it.
    """

    bits: int
    group: int
    channels: int | None = None
    normalise: bool = False

    def check(self, dims: tuple[int, int]) -> None:
        """Refuse head dims D and E that cannot be packed."""
        channels = dims[1] if self.channels is None else self.channels
        if dims[1] % channels:
            raise ValueError(f"channels={self.channels}: expected a divisor of the {dims[1]} value channels")
        for dim in dims:
            if self.group * dim * self.bits % 8:
                raise ValueError(f"group={self.group} of {dim} channels in {self.bits} bits: expected whole bytes")

    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Parts of groups, `[R, .]` each, of keys `[R, group, D]` and values `[R, group, E]`."""
        dtype = k.dtype if k.dtype.itemsize == 2 else torch.float32
        parts, wide = {}, v.float()
        if self.normalise:
            norm = wide.abs().amax(1).sqrt()
            norm = torch.where(norm > 0, norm, 1.0).to(dtype)
            parts["value_norm"], wide = norm, wide / norm[:, None].float()
        channels = wide.shape[2] if self.channels is None else self.channels
        for name, x, dim in (("key", k.float(), 1), ("value", wide.unflatten(2, (-1, channels)), 3)):
            codes, scale, low = quantise_range(x, self.bits, dim, dtype)
            parts |= {name: squeeze_codes(codes.flatten(1), self.bits)}
            parts |= {f"{name}_scale": scale.flatten(1), f"{name}_low": low.flatten(1)}
        return parts


def quantise_range(x: Tensor, bits: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 of `x` (fp32), and per slice along `dim` a scale and the least value, in `dtype` with 1 for `dim`."""
    low, high = x.aminmax(dim=dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    low = low.to(dtype)
    codes = ((x - low.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, low


class PackedGroups:
    """Groups of tokens in codes, each head its own number of groups; they stay until the store goes.

    Args:
        packing: How they are packed.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.table = PageTable(Arena(0, torch.device("cpu")), PageLayout({}, 1), 0, 0)

    @property
    def tokens(self) -> int:
        """Over all batch entries and heads."""
        return int(self.table.lengths.sum()) * self.packing.group

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.table.arena.nbytes

    @property
    def read_nbytes(self) -> int:
        """Bytes that attention over all of them reads: codes and scales, not positions."""
        parts = self.table.layout.parts
        of_group = sum(part.width * part.dtype.itemsize for name, part in parts.items() if name != "position")
        return int(self.table.lengths.sum()) * of_group

    def start(self, k: Tensor, v: Tensor) -> None:
        """Lay out for tokens like k `[B, G, m, D]` and v `[B, G, m, E]`."""
        self.packing.check((k.shape[3], v.shape[3]))
        rows = [x.new_zeros(1, self.packing.group, x.shape[3]) for x in (k, v)]
        parts = {name: (part.shape[1], part.dtype) for name, part in self.packing.encode(*rows).items()}
        layout = PageLayout(parts | {"position": (self.packing.group, torch.int32)}, 1)
        self.table = PageTable(Arena(layout.nbytes, k.device), layout, *k.shape[:2])

    def add(self, k: Tensor, v: Tensor, positions: Tensor, entry: Tensor, head: Tensor) -> None:
        """Take in groups.

        Args:
            k: `[R, group, D]`.
            v: `[R, group, E]`.
            positions: int64 `[R, group]`.
            entry: int64 `[R]`, whose they are; those of one head consecutive.
            head: int64 `[R]`.
        """
        before = self.table.lengths
        batch, heads = before.shape
        count = torch.bincount(entry * heads + head, minlength=batch * heads)
        first = (count.cumsum(0) - count)[entry * heads + head]
        rank = torch.arange(len(entry), device=entry.device) - first
        self.table.resize(before + count.view(batch, heads))
        parts = self.packing.encode(k, v) | {"position": positions}
        self.table.write((entry, head, before[entry, head] + rank), parts)

    def groups(self) -> KVGroups:
        """All of them, in place: good until one is added."""
        table, parts = self.table, self.table.parts
        rows: dict[str, Any] = {name: parts[name][:, 0] if name in parts else None for name in PARTS}
        return KVGroups(
            table=table.table, lengths=table.lengths, bits=self.packing.bits, size=self.packing.group, **rows
        )

    def select(self, rows: Tensor) -> PackedGroups:
        """Of these batch entries; memory is shared until written to."""
        other = PackedGroups(self.packing)
        other.table = self.table.select(rows)
        return other


class PackedStore(KVStore):
    """A store of recent tokens in floating point, whose slots are all that policies see, and packed older ones.

    Tokens come into the recent ones and leave for good, group by group, by `pack`. Attention is over both.

    Args:
        storage: Of the recent tokens.
        packings: Of the packed ones, one for each kind.
        stats: Of the recent tokens.

    Attributes:
        packed: `PackedGroups` of each kind.
    """

    def __init__(self, storage: Storage, packings: Sequence[Packing], stats: Sequence[str] = ()) -> None:
        super().__init__(storage, stats)
        self.packed = [PackedGroups(packing) for packing in packings]

    @property
    def tokens(self) -> int:
        """Tokens held over all batch entries and heads, packed ones among them."""
        return super().tokens + sum(part.tokens for part in self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, packed groups among them."""
        return super().nbytes + sum(part.nbytes for part in self.packed)

    @property
    def slot_nbytes(self) -> int:
        """Mean bytes of a token's key and value as they are now stored, scales included, rounded up."""
        total = super().tokens * super().slot_nbytes + sum(part.read_nbytes for part in self.packed)
        return math.ceil(total / max(1, self.tokens))

    def append(self, k: Tensor, v: Tensor, present: Tensor | None = None) -> None:
        """As `KVStore.append`; the first call also refuses head dims that cannot be packed."""
        first = self.empty
        if first and k.ndim == v.ndim == 4:
            for part in self.packed:
                part.packing.check((k.shape[3], v.shape[3]))
        super().append(k, v, present)
        if first:
            for part in self.packed:
                part.start(k, v)

    def pack(self, kinds: Sequence[Tensor]) -> None:
        """Pack recent tokens, of each head a whole number of groups, in order of position.

        Args:
            kinds: For each kind of `packed` bool `[B, G, n]`, disjoint.
        """
        leaving = torch.zeros_like(kinds[0])
        keys, values, positions = self.keys, self.values, self.positions
        last = torch.iinfo(torch.int64).max
        for part, chosen in zip(self.packed, kinds, strict=True):
            order = positions.masked_fill(~chosen, last).argsort(-1)
            entry, head, rank = (
                torch.arange(chosen.shape[2], device=order.device) < chosen.sum(-1)[..., None]
            ).nonzero(as_tuple=True)
            slot, group = order[entry, head, rank], part.packing.group
            k, v, place = (x[entry, head, slot].unflatten(0, (-1, group)) for x in (keys, values, positions))
            part.add(k, v, place, entry[::group], head[::group])
            leaving |= chosen
        self.evict(~leaving)

    def attend_packed(self, q: Tensor, **options: Any) -> list[AttentionOutput]:
        """Partial results of q `[B, H, M, D]`, see `saccade.ops.merge`; options as of `attend_groups`."""
        return [attend_groups(q, part.groups(), **options) for part in self.packed if part.tokens]

    def crop(self, count: int) -> None:
        """As `KVStore.crop`.

        Args:
            count: Last tokens to forget, of every sequence.

        Raises:
            ValueError: If the last `count` tokens are not all recent.
        """
        recent = int(self.lengths.min()) if self.lengths.numel() else 0
        if count > recent and any(part.tokens for part in self.packed):
            raise ValueError(f"count={count}: expected at most {recent}, the tokens that are not packed yet")
        super().crop(count)

    def form(self) -> dict[str, Any]:
        """As `KVStore.form`."""
        return super().form() | {"kind": "packed groups", "packings": [told(part.packing) for part in self.packed]}

    def tables(self) -> dict[str, Table]:
        """As `KVStore.tables`, with those of packed groups."""
        return super().tables() | {f"packed {number}": part.table for number, part in enumerate(self.packed)}

    def take_notes(self, parcel: Parcel, counts: dict[str, Tensor]) -> None:
        """As `KVStore.take_notes`; no more tokens than have come."""
        super().take_notes(parcel, counts)
        packed = (counts[f"packed {number}"] * part.packing.group for number, part in enumerate(self.packed))
        if bool((sum(packed, counts[TOKENS]) > self.seen[:, None]).any()):
            raise ValueError(f"lengths: expected at most {self.seen.tolist()} tokens of a head, packed ones included")

    def select(self, rows: Tensor) -> PackedStore:
        """As `KVStore.select`."""
        other = PackedStore(self.storage, [part.packing for part in self.packed], self.stats)
        other.__dict__.update({**super().select(rows).__dict__, "packed": other.packed})
        if not self.empty:
            other.packed = [part.select(rows.to(self.seen.device)) for part in self.packed]
        return other


def attend_tiers(q: Tensor, store: PackedStore, recent: AttentionOutput, **options: Any) -> AttentionOutput:
    """`recent`, attention over the recent tokens, merged with that over the packed ones."""
    return merge([recent, *store.attend_packed(q, **options)])


__all__ = ["PackedGroups", "PackedStore", "Packing", "attend_tiers", "quantise_range"]
