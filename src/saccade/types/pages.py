"""Stored keys and values: pages of tokens, of any length per head, in floating point or in codes of few bits.

Shapes, beside those of `saccade.types`: P pages, S = page size, T = pages of a table row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (8, 4)
"""Bits of a code."""

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def quantise(x: Tensor, bits: int, group: int, *, zero_point: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of `x` with one scale per `group` consecutive channels; each value comes back within half a scale.

    Args:
        x: Floating point `[..., D]`.
        bits: 8 (codes int8 `[..., D]`) or 4 (uint8 `[..., D / 2]`, see `KVPages`).
        group: Divides D.
        zero_point: Whether groups have a zero point too: better for values that are not centred.

    Returns:
        Codes, scales fp32 `[..., D / group]`, zero points fp32 of that shape or None.

    Raises:
        ValueError: If `bits`, `group` or D cannot be served.
    """
    dim = x.shape[-1]
    if bits not in BITS:
        raise ValueError(f"bits={bits}: expected 8 or 4")
    if group < 1 or dim % group:
        raise ValueError(f"group={group}: expected a divisor of the {dim} channels")
    if bits == 4 and dim % 2:
        raise ValueError(f"bits=4 with {dim} channels: expected an even number, two codes share a byte")
    most = 2 ** (bits - 1) - 1
    groups = x.float().unflatten(-1, (dim // group, group))
    if zero_point:
        low, high = groups.aminmax(dim=-1)
        middle = (low + high) / 2
        least = (middle.abs() * 2**-20).clamp(min=torch.finfo(torch.float32).tiny)  # keeps the zero point finite
        scale = torch.maximum((high - low) / (2 * most), least)
        zero = -middle / scale
    else:
        scale = (groups.abs().amax(-1) / most).clamp(min=torch.finfo(torch.float32).tiny)
        zero = None
    codes = groups / scale[..., None]
    if zero is not None:
        codes = codes + zero[..., None]
    codes = codes.round().clamp(-most, most).to(torch.int8).flatten(-2)
    if bits == 4:
        low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
        codes = low | high << 4
    return codes, scale, zero


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The inverse of `quantise`, in fp32 `[..., D]`."""
    if codes.dtype == torch.uint8:
        codes = torch.cat([codes & 15, codes >> 4], -1).to(torch.int8) - 8
    groups = codes.float().unflatten(-1, (scale.shape[-1], -1))
    if zero is not None:
        groups = groups - zero[..., None]
    return (groups * scale[..., None]).flatten(-2)


@dataclass(frozen=True, eq=False)
class KVPages:
    """Keys and values in pages; token j of (b, g) is row j % S of page `table[b, g, j // S]`.

    Keys may lie on pages of their own, P of them unlike those of the values, which heads may share (CHAI).

    What lies in a page past a head's length, and in pages that no table names, is never looked at.

    Args:
        k: `[P, S, D]` floating point, or codes: int8 `[P, S, D]`, or uint8 `[P, S, D / 2]` of 4 bits, where byte i
            holds channel i (low bits) and channel i + D / 2 (high bits), each code plus 8. A value is
            (code - zero) * scale.
        v: `[P, S, E]`, stored as k is.
        table: int64 `[B, G, T]`; entries past a head's length may be anything.
        lengths: int64 `[B, G]`: tokens of each key/value head, at most T * S.
        k_scale: fp32 `[P, S, D / group]`, given exactly with codes.
        v_scale: fp32 `[P, S, E / group]`, likewise.
        k_zero: Zero points, shaped like the scales, or None for 0.
        v_zero: As `k_zero`.
        key_table: int64 `[B, G, T']`, the pages of k; None where `table` has them.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_zero: Tensor | None = None
    v_zero: Tensor | None = None
    key_table: Tensor | None = None

    def __post_init__(self) -> None:
        alike = slice(0 if self.key_table is None else 1, 2)
        if self.k.ndim != 3 or self.v.ndim != 3 or self.k.shape[alike] != self.v.shape[alike] or self.k.shape[1] < 1:
            raise ValueError(
                f"k of shape {tuple(self.k.shape)} and v of shape {tuple(self.v.shape)}: expected [P, S, D] and "
                "[P, S, E] with the same P and S, S at least 1 (P may differ with a key_table)"
            )
        if self.k.dtype != self.v.dtype or self.k.dtype not in (*_FLOATS, torch.int8, torch.uint8):
            raise ValueError(
                f"k and v are {self.k.dtype} and {self.v.dtype}: expected one dtype: floats, int8 or uint8"
            )
        if self.table.ndim != 3 or self.lengths.shape != self.table.shape[:2]:
            raise ValueError(
                f"table of shape {tuple(self.table.shape)} and lengths of shape {tuple(self.lengths.shape)}: "
                "expected [B, G, T] and [B, G]"
            )
        if self.key_pages.ndim != 3 or self.key_pages.shape[:2] != self.lengths.shape:
            raise ValueError(
                f"key_table of shape {tuple(self.key_pages.shape)}: expected [B, G, T] with {tuple(self.lengths.shape)}"
            )
        for name, x in (("table", self.table), ("lengths", self.lengths), ("key_table", self.key_pages)):
            if x.dtype != torch.int64:
                raise ValueError(f"{name} of dtype {x.dtype}: expected torch.int64")
        self._check_scales()
        tensors = (
            self.v, self.table, self.lengths, self.k_scale, self.v_scale, self.k_zero, self.v_zero, self.key_table,
        )  # fmt: skip
        if any(x is not None and x.device != self.k.device for x in tensors):
            raise ValueError(f"k is on {self.k.device}: expected everything there")

    def _check_scales(self) -> None:
        """Scales exactly with codes, each group the same number of channels."""
        for name, dim, (codes, scale, zero, _) in zip(("k", "v"), self.dims, self.parts(), strict=True):
            if (scale is None) != (self.bits is None):
                raise ValueError(f"{name}_scale: expected with codes and only then, {name} is {self.k.dtype}")
            for label, x in ((f"{name}_scale", scale), (f"{name}_zero", zero)):
                if x is None:
                    continue
                fits = scale is not None and x.shape == scale.shape and x.dtype == torch.float32
                if not fits or x.shape[:-1] != codes.shape[:2] or x.shape[2] == 0 or dim % x.shape[2]:
                    raise ValueError(
                        f"{label} of shape {tuple(x.shape)} and dtype {x.dtype}: expected fp32 "
                        f"[{codes.shape[0]}, {codes.shape[1]}, n] with n a divisor of {dim}"
                    )

    @property
    def key_pages(self) -> Tensor:
        """The table of the keys."""
        return self.table if self.key_table is None else self.key_table

    def parts(self) -> tuple[tuple[Tensor, Tensor | None, Tensor | None, Tensor], ...]:
        """Pages, scales, zero points and table: of the keys, then of the values."""
        return (
            (self.k, self.k_scale, self.k_zero, self.key_pages),
            (self.v, self.v_scale, self.v_zero, self.table),
        )

    @property
    def bits(self) -> int | None:
        """Bits of a code, or None in floating point."""
        return {torch.int8: 8, torch.uint8: 4}.get(self.k.dtype)

    @property
    def dims(self) -> tuple[int, int]:
        """D and E."""
        return tuple(x.shape[2] * (2 if self.bits == 4 else 1) for x in (self.k, self.v))  # type: ignore[return-value]

    @property
    def page_size(self) -> int:
        """S."""
        return self.k.shape[1]

    @property
    def longest(self) -> int:
        """The greatest length."""
        return int(self.lengths.max()) if self.lengths.numel() else 0

    def nbytes(self) -> int:
        """Bytes of the stored keys and values, scales included."""
        tensors = (self.k, self.v, self.k_scale, self.v_scale, self.k_zero, self.v_zero)
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    def validate(self) -> None:
        """Check the contents: every token's page is there.

        Raises:
            ValueError: Naming the first length or page that is not.
        """
        low, high = map(int, torch.aminmax(self.lengths)) if self.lengths.numel() else (0, 0)
        self._check_table("table", self.table, self.v.shape[0], low, high)
        if self.key_table is not None:
            self._check_table("key_table", self.key_table, self.k.shape[0], low, high)

    def _check_table(self, name: str, table: Tensor, pages: int, low: int, high: int) -> None:
        """`validate` for one of the tables, into so many pages, with lengths in [low, high]."""
        capacity = table.shape[2] * self.page_size
        if low < 0 or high > capacity:
            raise ValueError(f"lengths in [{low}, {high}]: expected [0, {capacity}], the {name}'s room")
        if table.numel() == 0:
            return
        first, last = map(int, torch.aminmax(table))
        if first >= 0 and last < pages:  # most tables are good throughout: one pass over them, not eight
            return
        used = torch.arange(table.shape[2], device=table.device) * self.page_size < self.lengths[..., None]
        wrong = used & ((table < 0) | (table >= pages))
        if bool(wrong.any()):
            raise ValueError(f"{name} has page {int(table[wrong][0])}: expected pages in [0, {pages})")

    @classmethod
    def from_dense(
        cls,
        k: Tensor,
        v: Tensor,
        *,
        lengths: Tensor | None = None,
        page_size: int | None = None,
        bits: int | None = None,
        group: int | None = None,
        zero_point: bool = False,
    ) -> KVPages:
        """A cache with the contents of `k` and `v`.

        Args:
            k: `[B, G, N, D]`.
            v: `[B, G, N, E]`.
            lengths: int64 `[B, G]`, what of each head counts; None for all N.
            page_size: None for one page per head, which shares the memory of k and v where their strides allow.
            bits: Store codes of 8 or 4 bits; None keeps the dtype.
            group: Channels that share a scale; None for all of a token's.
            zero_point: Whether groups have zero points.

        Returns:
            The cache; head (b, g) owns consecutive pages.

        Raises:
            ValueError: If k and v are not of such shapes, or `page_size`, `bits`, `group` or `lengths` do not fit.
        """
        if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
            raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)}: expected [B, G, N, D] and [B, G, N, E]")
        batch, heads, tokens = k.shape[:3]
        size = max(tokens, 1) if page_size is None else page_size
        if size < 1:
            raise ValueError(f"page_size={page_size}: expected at least 1")
        per_head = -(-tokens // size)
        parts: list[Tensor] = []
        for x in (k, v):
            whole = torch.nn.functional.pad(x, (0, 0, 0, per_head * size - tokens)) if tokens != per_head * size else x
            parts.append(whole.reshape(batch * heads * per_head, size, x.shape[3]))
        scales: list[Tensor | None] = [None] * 4
        if bits is not None:
            for i, x in enumerate(parts):
                width = x.shape[2] if group is None else group
                parts[i], scales[i], scales[i + 2] = quantise(x, bits, width, zero_point=zero_point)
        table = torch.arange(batch * heads * per_head, device=k.device).view(batch, heads, per_head)
        if lengths is None:
            lengths = torch.full((batch, heads), tokens, dtype=torch.int64, device=k.device)
        cache = cls(parts[0], parts[1], table, lengths, *scales)
        cache.validate()
        return cache

    def to_dense(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """`k` `[B, G, N, D]` and `v` `[B, G, N, E]` with N the greatest length, zeros past each head's own."""
        token = torch.arange(self.longest, device=self.k.device)
        present = token < self.lengths[..., None]
        dense = []
        for x, scale, zero, table in self.parts():
            at = (table[:, :, token // self.page_size].masked_fill(~present, 0), token % self.page_size)
            rows = x[at] if scale is None else dequantise(x[at], scale[at], None if zero is None else zero[at])
            dense.append(rows.to(dtype).masked_fill(~present[..., None], 0.0))
        return dense[0], dense[1]
