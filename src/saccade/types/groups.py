"""Stored keys and values packed in groups of tokens: key channels have scales of their own in each group.

Shapes, beside those of `saccade.types`: P groups in memory, S tokens of a group, T = groups of a table row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (8, 4, 2)
"""Bits of a code."""

_SCALES = (torch.float32, torch.bfloat16, torch.float16)


def squeeze_codes(codes: Tensor, bits: int) -> Tensor:
    """Bytes of codes, uint8 `[.., n]`: byte i holds codes i, i + n bits / 8, .., the first in the lowest bits."""
    parts = codes.chunk(8 // bits, -1)
    packed = parts[0].clone()
    for number, part in enumerate(parts[1:], 1):
        packed |= part << number * bits
    return packed


def spread_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `squeeze_codes`."""
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)], -1)


@dataclass(frozen=True, eq=False)
class KVGroups:
    """Keys and values as x = low + scale * code, S tokens together; group n of (b, g) is number `table[b, g, n]`.

    A key channel has one scale and low for the group; a value has them for every `channels` of its own, and may be
    multiplied by a norm of each channel for the group. What no head's table names is never looked at.

    Args:
        key: Codes of a group's keys `[S, D]` as one row, see `squeeze_codes`: uint8 `[P, S D bits / 8]`.
        key_scale: `[P, D]` in fp32, bf16 or fp16, as the other scales.
        key_low: `[P, D]`.
        value: Codes of a group's values `[S, E]`: uint8 `[P, S E bits / 8]`.
        value_scale: `[P, S E / channels]`, token by token.
        value_low: Likewise.
        value_norm: `[P, E]`, or None for 1.
        table: int64 `[B, G, T]`; entries past a head's length may be anything.
        lengths: int64 `[B, G]`: groups of each key/value head.
        bits: Of a code: 8, 4 or 2.
        size: S.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """

    key: Tensor
    key_scale: Tensor
    key_low: Tensor
    value: Tensor
    value_scale: Tensor
    value_low: Tensor
    value_norm: Tensor | None
    table: Tensor
    lengths: Tensor
    bits: int
    size: int

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: expected 8, 4 or 2")
        if self.size < 1:
            raise ValueError(f"size={self.size}: expected at least 1 token")
        if self.table.ndim != 3 or self.lengths.shape != self.table.shape[:2]:
            shown = f"{tuple(self.table.shape)} and lengths of shape {tuple(self.lengths.shape)}"
            raise ValueError(f"table of shape {shown}: expected [B, G, T] and [B, G]")
        dim, value_dim = self.dims
        widths = {"key": self.size * dim * self.bits // 8, "key_scale": dim, "key_low": dim,
                  "value": self.size * value_dim * self.bits // 8, "value_low": self.value_scale.shape[-1],
                  "value_norm": value_dim, "value_scale": self.size * value_dim // max(1, self.channels)}  # fmt: skip
        for name, width in widths.items():
            x, kind = getattr(self, name), torch.uint8 if name in ("key", "value") else self.key_scale.dtype
            if x is None and name == "value_norm":
                continue
            if x.shape != (len(self.key), width) or x.dtype != kind or x.device != self.key.device:
                raise ValueError(
                    f"{name} of shape {tuple(x.shape)} and {x.dtype}: expected {kind} [{len(self.key)}, {width}]"
                )
        for name in ("table", "lengths"):
            if getattr(self, name).dtype != torch.int64 or getattr(self, name).device != self.key.device:
                raise ValueError(
                    f"{name} of dtype {getattr(self, name).dtype}: expected torch.int64, where the keys are"
                )
        if self.key_scale.dtype not in _SCALES:
            raise ValueError(f"key_scale of {self.key_scale.dtype}: expected fp32, bf16 or fp16")

    @property
    def dims(self) -> tuple[int, int]:
        """D and E."""
        return self.key_scale.shape[1], self.value.shape[1] * 8 // self.bits // self.size

    @property
    def channels(self) -> int:
        """Channels of a value that share a scale."""
        return self.size * self.dims[1] // max(1, self.value_scale.shape[1])

    @property
    def longest(self) -> int:
        """Groups of the head with the most."""
        return int(self.lengths.max()) if self.lengths.numel() else 0

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """All that groups have: `key` to `value_norm`, in that order."""
        return (self.key, self.key_scale, self.key_low, self.value, self.value_scale, self.value_low, self.value_norm)

    def validate(self) -> None:
        """Check the contents: every group is there.

        Raises:
            ValueError: Naming the first length or number that does not fit.
        """
        room = self.table.shape[2]
        low, high = map(int, torch.aminmax(self.lengths)) if self.lengths.numel() else (0, 0)
        if low < 0 or high > room:
            raise ValueError(f"lengths in [{low}, {high}]: expected [0, {room}], the table's room")
        used = torch.arange(room, device=self.table.device) < self.lengths[..., None]
        wrong = used & ((self.table < 0) | (self.table >= len(self.key)))
        if bool(wrong.any()):
            raise ValueError(f"table has group {int(self.table[wrong][0])}: expected groups in [0, {len(self.key)})")

    def to_dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys `[B, G, n S, D]` and values `[B, G, n S, E]` of the groups start .. stop - 1 of every head.

        Args:
            dtype: Of the result; computed in fp32 at least.
            start: First group.
            stop: The group after the last; None for that of the longest head.

        Returns:
            Copies; past a head's length anything.
        """
        place = torch.arange(start, self.longest if stop is None else stop, device=self.table.device)
        group = self.table[:, :, place].masked_fill(place >= self.lengths[..., None], 0)
        wide = torch.promote_types(dtype, torch.float32)
        k, v = (
            spread_codes(x[group], self.bits).unflatten(-1, (self.size, -1)).to(wide) for x in (self.key, self.value)
        )
        k = k * self.key_scale[group][..., None, :].to(wide) + self.key_low[group][..., None, :].to(wide)
        scale, low = (
            x[group].unflatten(-1, (self.size, -1))[..., None].to(wide) for x in (self.value_scale, self.value_low)
        )
        v = (v.unflatten(-1, (scale.shape[-2], -1)) * scale + low).flatten(-2)
        if self.value_norm is not None:
            v = v * self.value_norm[group][..., None, :].to(wide)
        return k.flatten(2, 3).to(dtype), v.flatten(2, 3).to(dtype)


__all__ = ["BITS", "KVGroups", "spread_codes", "squeeze_codes"]
