"""Shapes, enums and small records that every room shares. See `saccade.types` for the legend."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Pattern(StrEnum):
    """The four attention patterns of CAB: who attends to whom, and whether the future is hidden."""

    NONCAUSAL_SELF = "noncausal-self"
    CAUSAL_SELF = "causal-self"
    NONCAUSAL_CROSS = "noncausal-cross"
    CAUSAL_CROSS = "causal-cross"


class Kind(StrEnum):
    """What a mechanism is, which fixes the one method it has (see `saccade.mechanisms.base`)."""

    SELECTOR = "selector"
    SCORE = "score"
    POSITION = "position"
    HEADS = "heads"
    MIXER = "mixer"
    LAYER = "layer"
    REDUCER = "reducer"
    CACHE_POLICY = "cache-policy"
    INTERVENTION = "intervention"
    PARALLEL = "parallel"
    PROBE = "probe"


class AttentionOutput(NamedTuple):
    """What a softmax engine returns: `out` `[B, H, M, E]` and, if asked for, `lse` `[B, H, M]` fp32, else None."""

    out: Tensor
    lse: Tensor | None


@dataclass(frozen=True)
class Geometry:
    """Where the tokens of one call lie: all that a selector may know beside `q` and `k`.

    Args:
        causal: Hide the future; bottom-right aligned, query i sees keys j <= i + N - M.
        grid: Sizes of the 1-D, 2-D or 3-D grid the tokens lie on, row-major; None for plain sequences.
        prefix: Tokens before the grid (for example text before an image) that attend everywhere. Needs `grid`.
        suffix: Tokens after the grid that attend everywhere. Needs `grid`.
        q_segments: int `[B or 1, M]`; a query sees only keys of its own segment. Negative = padding, sees nothing.
        kv_segments: int `[B or 1, N]`; given exactly when `q_segments` is.

    Raises:
        ValueError: If a value is out of range, or only one of the segment tensors is given.
    """

    causal: bool = False
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    suffix: int = 0
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and (not 1 <= len(self.grid) <= 3 or min(self.grid) < 1):
            raise ValueError(f"grid={self.grid}: expected one to three sizes, each at least 1")
        if self.prefix < 0 or self.suffix < 0:
            raise ValueError(f"prefix={self.prefix}, suffix={self.suffix}: expected counts of at least 0")
        if self.grid is None and (self.prefix or self.suffix):
            raise ValueError(f"prefix={self.prefix}, suffix={self.suffix}: only meaningful together with grid")
        if (self.q_segments is None) != (self.kv_segments is None):
            raise ValueError("q_segments and kv_segments: expected both or neither")

    @property
    def grid_tokens(self) -> int | None:
        """Number of tokens on the grid, or None without one."""
        return None if self.grid is None else math.prod(self.grid)

    def replace(self, **changes: object) -> Geometry:
        """A copy with the named fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class TokenIndex:
    """Lists of keys: query group g attends to `indices[b, h, g]`.

    Args:
        indices: int64 `[B or 1, H or G or 1, ceil(M / group), K]`, key positions in [0, N); -1 marks an empty slot.
            A position appears at most once in a list.
        queries: M.
        keys: N.
        group: Number of consecutive queries that share one list.
        causal: Within a list, additionally hide keys j > i + N - M from query i (needed when `group` > 1).

    Raises:
        ValueError: If the shape, `group` or the range of an index is wrong.
    """

    indices: Tensor
    queries: int
    keys: int
    group: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"group={self.group}: expected at least 1")
        groups = -(-self.queries // self.group)
        if self.indices.ndim != 4 or self.indices.shape[2] != groups:
            raise ValueError(
                f"indices of shape {tuple(self.indices.shape)}: expected [B or 1, H or 1, {groups}, K] "
                f"for {self.queries} queries in groups of {self.group}"
            )
        if self.indices.dtype != torch.int64:
            raise ValueError(f"indices of dtype {self.indices.dtype}: expected torch.int64")

    def validate(self) -> None:
        """Check the contents (costs a pass over the indices): range, and no repeats within a list."""
        if self.indices.numel() == 0:
            return
        low, high = int(self.indices.min()), int(self.indices.max())
        if low < -1 or high >= self.keys:
            raise ValueError(f"indices in [{low}, {high}]: expected -1 or positions in [0, {self.keys})")
        ordered = self.indices.sort(-1).values
        repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        if bool(repeated.any()):
            position = int(ordered[..., 1:][repeated][0])
            raise ValueError(f"indices: key {position} appears twice in one list, expected each at most once")

    def to_dense(self) -> Tensor:
        """The bool mask `[B or 1, H or 1, M, N]` it stands for. For small sizes: it is M x N."""
        batch, heads, groups, _ = self.indices.shape
        mask = torch.zeros(batch, heads, groups, self.keys + 1, dtype=torch.bool, device=self.indices.device)
        mask.scatter_(-1, torch.where(self.indices < 0, self.keys, self.indices), value=True)
        mask = mask[..., : self.keys].repeat_interleave(self.group, 2)[:, :, : self.queries]
        if self.causal:
            offset = self.keys - self.queries
            mask = mask & torch.ones_like(mask[0, 0]).tril(offset)
        return mask

    def density(self) -> float:
        """Fraction of the M x N pairs that is kept (causality inside a group counted)."""
        valid = self.indices >= 0
        if valid.numel() == 0:
            pairs = 0
        elif self.causal:
            first = torch.arange(valid.shape[2], device=valid.device)[:, None] * self.group + self.keys - self.queries
            size = (self.queries - torch.arange(valid.shape[2], device=valid.device) * self.group).clamp(max=self.group)
            seen = (size[:, None] - (self.indices - first).clamp(min=0)).clamp(min=0)
            pairs = int((seen * valid).sum())
        else:
            last = self.queries - (valid.shape[2] - 1) * self.group
            per_group = valid.sum(-1)
            pairs = int(per_group[..., :-1].sum()) * self.group + int(per_group[..., -1].sum()) * last
        total = valid.shape[0] * valid.shape[1] * self.queries * self.keys
        return pairs / total if total else 0.0
