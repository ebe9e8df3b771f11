"""The kinds of mechanism: each has one abstract method, its formula. Plumbing that two of them share lives here.

A mechanism without learned weights is a frozen dataclass of its hyperparameters that checks them in `__post_init__`
(`require`). One with learned weights is an `nn.Module`. Both are registered with `@register`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

from torch import Tensor, nn

from saccade.catalog import Card
from saccade.mechanisms.checks import require, require_pattern
from saccade.ops import attend, block_attend, gather_attend
from saccade.ops.checks import check_qkv, check_segments
from saccade.ops.dispatch import RunRecord, is_recording, record
from saccade.types import AttentionOutput, BlockLayout, Boxes, Geometry, Kind, Pattern, TokenIndex

ALL_PATTERNS = frozenset(Pattern)
SELF_PATTERNS = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})
PLAIN = Geometry()


class Selector(ABC):
    """*Where*: chooses the pairs that are computed; an engine computes exactly those.

    `select` may leave causality and segments to the base, which cuts them from what it returns, but must not let a
    choice depend on keys that a query may not see.
    """

    card: ClassVar[Card]
    adds: ClassVar[bool] = False
    """Whether a call adds something, such as a stand-in for what is left out, to attention over what is selected."""

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, geometry: Geometry) -> BlockLayout | TokenIndex | Boxes:
        """The pairs to compute for `q` `[B, H, M, D]` and `k` `[B, G, N, D]`."""

    def pattern(self, q: Tensor, k: Tensor, geometry: Geometry = PLAIN) -> BlockLayout | TokenIndex | Boxes:
        """`select`, checked and cut to what causality and segments allow."""
        require_pattern(self.card, q, k, geometry)
        chosen = self.select(q, k, geometry)
        return chosen.within(geometry) if isinstance(chosen, BlockLayout) else chosen

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = ..., scale: float | None = ...,
        return_lse: Literal[False] = ..., impl: str = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = ..., scale: float | None = ...,
        return_lse: Literal[True], impl: str = ...,
    ) -> AttentionOutput: ...  # fmt: skip
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        geometry: Geometry = PLAIN,
        scale: float | None = None,
        return_lse: bool = False,
        impl: str = "auto",
    ) -> Tensor | AttentionOutput:
        """Softmax attention over the selected pairs.

        Args:
            q: `[B, H, M, D]`.
            k: `[B, G, N, D]`.
            v: `[B, G, N, E]`.
            geometry: Causality, segments and grid.
            scale: Factor on q k^T; None means D^-0.5.
            return_lse: Also return the log-sum-exp `[B, H, M]`.
            impl: Implementation of the engine.

        Returns:
            `[B, H, M, E]`, or `AttentionOutput` with `return_lse`.

        Raises:
            ValueError: If shapes do not fit or the pattern is not one this mechanism is defined for.
        """
        check_qkv(q, k, v)
        check_segments(q, k, geometry.q_segments, geometry.kv_segments)
        started = time.perf_counter()
        frozen_q, frozen_k = (x.detach() if x.requires_grad else x for x in (q, k))
        chosen = self.pattern(frozen_q, frozen_k, geometry)
        if is_recording():
            record(RunRecord("select", self.card.name, select_seconds=time.perf_counter() - started))
        engine: Any = block_attend if isinstance(chosen, BlockLayout) else gather_attend
        return engine(q, k, v, chosen, scale=scale, return_lse=return_lse, impl=impl)


class Score(ABC):
    """*Score*: how scores become weights. Needs whole rows, so it runs on `attend` in bounded chunks of queries."""

    card: ClassVar[Card]

    @abstractmethod
    def normalise(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Weights from scaled scores.

        Args:
            scores: q k^T * scale, fp32 or fp64 `[B, H, m, N]`, finite everywhere, for a chunk of m queries.
            mask: Bool, broadcasts to `scores`; True = may attend.

        Returns:
            Weights `[B, H, m, N]`, 0 where `mask` is False; rows need not sum to 1.
        """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, scale: float | None = None,
        impl: str = "auto",
    ) -> Tensor:  # fmt: skip
        """Attention with these weights: `[B, H, M, E]` from q `[B, H, M, D]`, k `[B, G, N, D]`, v `[B, G, N, E]`."""
        check_qkv(q, k, v)
        require_pattern(self.card, q, k, geometry)
        return attend(
            q, k, v, causal=geometry.causal, q_segments=geometry.q_segments, kv_segments=geometry.kv_segments,
            scale=scale, normalise=self.normalise, impl=impl,
        )  # fmt: skip


class Position(ABC):
    """*Position*: how place enters queries and keys."""

    card: ClassVar[Card]

    @abstractmethod
    def encode(self, x: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys `[B, H, M, D]` with their places mixed in; `positions` int `[M]` or `[B, M]`."""


class Heads(ABC):
    """*Heads*: how query heads share keys and values."""

    card: ClassVar[Card]

    @abstractmethod
    def share(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of G heads `[B, G, N, .]` from those of H heads `[B, H, N, .]`."""


class Mixer(ABC):
    """Token mixing on q, k, v that is not softmax over pairs: states and landmarks."""

    card: ClassVar[Card]

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, state: Any) -> tuple[Tensor, Any]:
        """Output `[B, H, M, E]` and the state after the last token (None if the mechanism carries none)."""

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = ..., state: Any = ...,
        return_state: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = ..., state: Any = ...,
        return_state: Literal[True],
    ) -> tuple[Tensor, Any]: ...  # fmt: skip
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, state: Any = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Any]:  # fmt: skip
        """Mix the tokens.

        Args:
            q: `[B, H, M, D]`.
            k: `[B, G, N, D]`.
            v: `[B, G, N, E]`.
            geometry: Causality and grid.
            state: What an earlier call returned, to continue its sequence.
            return_state: Also return the state after the last token.

        Returns:
            `[B, H, M, E]`, or `(out, state)` with `return_state`.

        Raises:
            ValueError: If shapes do not fit, or a state is asked of a mechanism without the "streaming" capability.
        """
        check_qkv(q, k, v)
        require_pattern(self.card, q, k, geometry)
        if (state is not None or return_state) and "streaming" not in self.card.supports:
            raise ValueError(f"return_state={return_state}: {self.card.name} carries no state")
        out, state = self.mix(q, k, v, geometry.causal, state)
        return (out, state) if return_state else out


class Layer(nn.Module, ABC):
    """A module with learned weights on tokens `[B, N, C]` or feature maps `[B, C, *grid]`; also gates and adapters.

    `sample_inputs` says what a small call looks like, for the laws: a tuple of tensors for `forward`.
    """

    card: ClassVar[Card]

    @abstractmethod
    def forward(self, *inputs: Tensor) -> Tensor:
        """See the mechanism."""

    @classmethod
    @abstractmethod
    def sample_inputs(cls, batch: int, generator: Any, dtype: Any, device: Any) -> tuple[Tensor, ...]:
        """Inputs that fit a module built from the card's `example`, with the given batch first."""


@dataclass(frozen=True, eq=False)
class Reduced:
    """Fewer tokens and the map back.

    Args:
        tokens: `[B, K, C]`.
        kept: int64 `[B, K]`, place of each kept token in the input, ascending.
        assignment: int64 `[B, N]`, for each input token the row of `tokens` that stands for it.
    """

    tokens: Tensor
    kept: Tensor
    assignment: Tensor

    def restore(self, tokens: Tensor) -> Tensor:
        """Spread `[B, K, C]` back to `[B, N, C]`: each input token gets the one that stands for it."""
        return tokens.gather(1, self.assignment[..., None].expand(-1, -1, tokens.shape[-1]))


class Reducer(ABC):
    """*Reduce*: fewer tokens."""

    card: ClassVar[Card]

    @abstractmethod
    def reduce(self, tokens: Tensor, keys: Tensor | None = None) -> Reduced:
        """Fewer tokens from `[B, N, C]`; `keys` `[B, N, C']` are what similarity is measured on (default: tokens)."""


class Intervention(ABC):
    """*Steer*: an edit of a layer's attention weights at inference."""

    card: ClassVar[Card]

    @abstractmethod
    def edit(self, weights: Tensor, mask: Tensor) -> Tensor:
        """New weights from softmax weights `[B, H, m, N]`, for a chunk of m queries; `mask` as in `Score`."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, geometry: Geometry = PLAIN, scale: float | None = None,
        impl: str = "auto",
    ) -> Tensor:  # fmt: skip
        """Softmax attention with edited weights: `[B, H, M, E]`."""
        check_qkv(q, k, v)
        require_pattern(self.card, q, k, geometry)

        def normalise(scores: Tensor, mask: Tensor) -> Tensor:
            weights = scores.masked_fill(~mask, -float("inf")).softmax(-1).nan_to_num(0.0)
            return self.edit(weights, mask)

        return attend(
            q, k, v, causal=geometry.causal, q_segments=geometry.q_segments, kv_segments=geometry.kv_segments,
            scale=scale, normalise=normalise, impl=impl,
        )  # fmt: skip


class Probe(ABC):
    """A reading of attention. Sees weights chunk by chunk; `result` turns what it kept into a figure or a map."""

    card: ClassVar[Card]

    @abstractmethod
    def observe(self, weights: Tensor, mask: Tensor, first_query: int, layer: int) -> None:
        """Take in softmax weights `[B, H, m, N]` of queries `first_query ...` of one layer."""

    @abstractmethod
    def result(self) -> Any:
        """What was measured; its shape is in the mechanism's docstring."""


__all__ = [
    "ALL_PATTERNS", "PLAIN", "SELF_PATTERNS", "Heads", "Intervention", "Kind", "Layer", "Mixer", "Position", "Probe",
    "Reduced", "Reducer", "Score", "Selector", "require", "require_pattern",
]  # fmt: skip
