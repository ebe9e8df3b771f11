"""Storage: how keys and values lie in memory, in floating point or in codes of few bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.mechanisms.cache.pagetable import PageLayout
from saccade.mechanisms.checks import require
from saccade.ops.checks import accumulation_dtype
from saccade.types.pages import dequantise, quantise

KEY, VALUE = (tuple(f"{name}{part}" for part in ("", "_scale", "_zero")) for name in ("key", "value"))
"""Parts of a page that hold what `Storage.encode` makes of a key and of a value."""


@dataclass(frozen=True)
class Storage:
    """How a `KVStore` holds keys and values.

    Args:
        bits: Bits of a code: 8, 4 or 2, quantised token by token; None stores floating point. The engine reads 8 and 4
            bits in place; 2 bits are widened first.
        dtype: Floating-point type to store, or None for that of the keys as they come. Not together with `bits`.
        group: Channels that share a scale; None for all of a token's.
        zero_point: Whether groups have a zero point too; 2 bits always have.
        normalise: Divide each channel by the square root of its largest size in the first tokens appended, so that a
            few large channels do not cost the others their precision (ZipCache's channel-separable quantisation).
            Undone in the query and in the output, not in the cache.
        page: Tokens of a page.
    """

    bits: int | None = None
    dtype: torch.dtype | None = None
    group: int | None = None
    zero_point: bool = False
    normalise: bool = False
    page: int = 64

    def __post_init__(self) -> None:
        require(self.bits in (None, 8, 4, 2), "bits", self.bits, "8, 4, 2, or None for floating point")
        floating = self.dtype is None or self.dtype.is_floating_point
        require(floating, "dtype", self.dtype, "a floating-point type or None")
        require(self.bits is None or self.dtype is None, "dtype", self.dtype, f"None together with bits={self.bits}")
        require(self.group is None or self.group >= 1, "group", self.group, "at least 1 channel, or None")
        require(self.page >= 1, "page", self.page, "at least 1 token")
        for name in ("group", "zero_point", "normalise"):
            value = getattr(self, name)
            require(self.bits is not None or not value, name, value, "left alone in floating point")

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is stored of `x` `[.., D]`: floats; or codes, scales and perhaps zero points, fp32 `[.., D / group]`.

        Args:
            x: Floating point.

        Returns:
            One to three tensors, see `decode`.

        Raises:
            ValueError: If `group` or `bits` do not divide the channels.
        """
        if self.bits is None:
            return (x if self.dtype is None else x.to(self.dtype),)
        group = x.shape[-1] if self.group is None else self.group
        if self.bits == 2:
            return _quantise_2(x, group)
        codes, scale, zero = quantise(x, self.bits, group, zero_point=self.zero_point)
        return (codes, scale) if zero is None else (codes, scale, zero)

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The inverse of `encode`, but for what quantisation has lost, in `dtype`."""
        if self.bits is None:
            return parts[0].to(dtype)
        if self.bits == 2:
            return _dequantise_2(*parts).to(dtype)
        return dequantise(parts[0], parts[1], parts[2] if len(parts) > 2 else None).to(dtype)


def _quantise_2(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 3, byte i holding channels i, i + D / 4, ..; scales and zero points `[.., D / group]`."""
    dim = x.shape[-1]
    if dim % group:
        raise ValueError(f"group={group}: expected a divisor of the {dim} channels")
    if dim % 4:
        raise ValueError(f"bits=2 with {dim} channels: expected a multiple of 4, four codes share a byte")
    groups = x.float().unflatten(-1, (dim // group, group))
    low, high = groups.aminmax(dim=-1)
    least = (low.abs() * 2**-20).clamp(min=torch.finfo(torch.float32).tiny)  # keeps the zero point finite
    scale = torch.maximum((high - low) / 3, least)
    zero = -low / scale
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 3).to(torch.uint8).flatten(-2)
    a, b, c, d = codes.chunk(4, -1)
    return a | b << 2 | c << 4 | d << 6, scale, zero


def _dequantise_2(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    wide = torch.cat([codes >> shift & 3 for shift in (0, 2, 4, 6)], -1).float()
    groups = wide.unflatten(-1, (scale.shape[-1], -1))
    return ((groups - zero[..., None]) * scale[..., None]).flatten(-2)


def lay_out(storage: Storage, stats: Sequence[str], dims: tuple[int, int], dtype: torch.dtype) -> PageLayout:
    """What a page holds.

    Args:
        storage: How keys and values lie in it.
        stats: Names of numbers for each token.
        dims: D and E.
        dtype: Of the keys and values that come.

    Returns:
        With the parts of keys and values, "position" and the stats.
    """
    parts: dict[str, tuple[int, torch.dtype]] = {}
    for names, dim in zip((KEY, VALUE), dims, strict=True):
        sample = storage.encode(torch.zeros(1, dim, dtype=dtype))
        parts |= {name: (part.shape[1], part.dtype) for name, part in zip(names, sample, strict=False)}
    parts["position"] = (1, torch.int32)
    parts |= dict.fromkeys(stats, (1, accumulation_dtype(dtype)))
    return PageLayout(parts, storage.page)


FORMS = (Storage(bits=8), Storage(bits=4, group=32))
"""Codes that the engine reads in place, in the forms that are measured and searched."""

__all__ = ["FORMS", "KEY", "VALUE", "Storage", "lay_out"]
