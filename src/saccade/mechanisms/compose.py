"""Decisions compose: where, positions, score and heads in one attention function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from saccade.mechanisms.base import PLAIN, Heads, Position, Score, Selector, require, require_pattern
from saccade.ops import attend
from saccade.ops.checks import check_qkv, check_segments
from saccade.types import AttentionOutput, Geometry

if TYPE_CHECKING:
    from saccade.catalog import Card

DECISIONS = {"where": Selector, "positions": Position, "score": Score, "heads": Heads}
"""Each decision and the kind of mechanism that takes it."""


@dataclass(frozen=True)
class Attention:
    """Attention put together from decisions; each left out is plain softmax attention's.

    Order: `heads` shares keys and values, `positions` encodes queries and keys, then `where` or `score` runs on its
    engine. Whatever a member's card does not support is refused with the reason. Members with learned weights are not
    registered here; a surrounding `nn.Module` should hold them.

        Attention(where=SinkWindow(window=256), heads=GQA(groups=2))(q, k, v, geometry=Geometry(causal=True))

    Args:
        where: Which pairs are computed; None means all.
        positions: How place enters queries and keys; None means not at all.
        score: How scores become weights; None means softmax. Not together with `where`.
        heads: How key/value heads are shared; None means as they come.

    Raises:
        ValueError: If a member is not of its kind, or `where` and `score` are both given.
    """

    where: Selector | None = None
    positions: Position | None = None
    score: Score | None = None
    heads: Heads | None = None

    def __post_init__(self) -> None:
        for name, kind in DECISIONS.items():
            member = getattr(self, name)
            require(member is None or isinstance(member, kind), name, member, f"a {kind.__name__}, or None")
        if self.where is not None and self.score is not None:
            raise ValueError(
                f"where={self.where.card.name!r} with score={self.score.card.name!r}: expected one of the two, because "
                "a score needs whole rows and a selector's engine computes parts of rows by softmax"
            )

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = ..., scale: float | None = ...,
        q_positions: Tensor | None = ..., return_lse: Literal[False] = ..., impl: str = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = ..., scale: float | None = ...,
        q_positions: Tensor | None = ..., return_lse: Literal[True], impl: str = ...,
    ) -> AttentionOutput: ...  # fmt: skip
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        geometry: Geometry = PLAIN,
        scale: float | None = None,
        q_positions: Tensor | None = None,
        return_lse: bool = False,
        impl: str = "auto",
    ) -> Tensor | AttentionOutput:
        """Attention with these decisions.

        Args:
            q: `[B, H, M, D]`.
            k: `[B, G, N, D]`; with `heads`, the heads before sharing.
            v: `[B, G, N, E]`; with `heads`, the heads before sharing.
            geometry: Causality, segments and grid.
            scale: Factor on q k^T; None means the engine's or the score's default, D^-0.5 unless its docstring differs.
            q_positions: Places of the queries, int `[M]` or `[B, M]`; None means bottom-right aligned, N - M .. N - 1.
                Keys are at 0 .. N - 1. Only together with `positions`.
            return_lse: Also return the log-sum-exp `[B, H, M]`.
            impl: Implementation of the engine.

        Returns:
            `[B, H, M, E]`, or `AttentionOutput` with `return_lse`.

        Raises:
            ValueError: If shapes do not fit, or a member does not support what is asked.
        """
        check_qkv(q, k, v)
        check_segments(q, k, geometry.q_segments, geometry.kv_segments)
        self._refuse(q, k, geometry, q_positions, return_lse)
        k, v = self._share(k, v, geometry)
        check_qkv(q, k, v)
        q, k = self._place(q, k, q_positions)
        options: dict[str, Any] = {"scale": scale, "impl": impl}
        if self.where is not None:
            where: Callable[..., Tensor | AttentionOutput] = self.where
            return where(q, k, v, geometry=geometry, return_lse=return_lse, **options)
        if self.score is not None:
            return self.score(q, k, v, geometry=geometry, **options)
        return attend(
            q, k, v, causal=geometry.causal, q_segments=geometry.q_segments, kv_segments=geometry.kv_segments,
            return_lse=return_lse, **options,
        )  # fmt: skip

    @property
    def cards(self) -> dict[str, Card]:
        """The cards of the decisions that are taken, by decision."""
        members = {name: getattr(self, name) for name in DECISIONS}
        return {name: member.card for name, member in members.items() if member is not None}

    def _refuse(self, q: Tensor, k: Tensor, geometry: Geometry, q_positions: Tensor | None, return_lse: bool) -> None:
        """Whatever a member's card does not support, before any work."""
        for name, card in self.cards.items():
            require_pattern(card, q, k, geometry)
            if return_lse and name in ("where", "score") and "lse" not in card.supports:
                raise ValueError(f"return_lse=True: {card.name} does not support returning the log-sum-exp")
        if q_positions is None:
            return
        if self.positions is None:
            raise ValueError("q_positions: expected None, because positions=None")
        if tuple(q_positions.shape) not in ((q.shape[2],), (q.shape[0], q.shape[2])):
            raise ValueError(
                f"q_positions of shape {tuple(q_positions.shape)}: expected [{q.shape[2]}] or {list(q.shape[::2])}"
            )

    def _share(self, k: Tensor, v: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Keys and values of the heads that remain."""
        if geometry.kv_segments is not None and (self.heads is not None or self.positions is not None):
            # learned weights take their gradient from every key, so poison in padding must not get as far as them
            padding = (geometry.kv_segments < 0)[:, None, :, None]
            k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
        return (k, v) if self.heads is None else self.heads.share(k, v)

    def _place(self, q: Tensor, k: Tensor, q_positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys with their places mixed in."""
        if self.positions is None:
            return q, k
        queries, keys = q.shape[2], k.shape[2]
        if q_positions is None:
            q_positions = torch.arange(keys - queries, keys, device=q.device)
        return self.positions.encode(q, q_positions), self.positions.encode(k, torch.arange(keys, device=k.device))


__all__ = ["Attention"]
