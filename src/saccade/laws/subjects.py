"""How each kind of mechanism is called on a problem, so that one law serves them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalog import Card
from saccade.laws.base import NotApplicable, Problem, make_problem
from saccade.mechanisms.compose import Attention
from saccade.mechanisms.diffusion.base import OutputReuse
from saccade.ops import attend, block_attend, gather_attend
from saccade.types import BlockLayout, Boxes, Geometry, Kind, Pattern, TokenIndex

PAIRWISE = frozenset({Kind.SELECTOR, Kind.SCORE, Kind.POSITION, Kind.HEADS, Kind.MIXER, Kind.INTERVENTION})
"""Kinds that map q, k, v to an output like attention does (an intervention only if it edits attention)."""


def form_of(card: Card) -> str:
    """How the mechanism is called, which decides what its laws look at: "pairwise", "reuse" or its kind."""
    if issubclass(card.target, OutputReuse):
        return "reuse"
    return "pairwise" if card.kind in PAIRWISE else str(card.kind)


class Subject:
    """A mechanism under test.

    Args:
        card: Its card.
        device: Where to run.
        settings: Hyperparameters; None means the card's `example`.
    """

    def __init__(self, card: Card, device: str = "cpu", settings: Any = None) -> None:
        self.card = card
        self.device = device
        torch.manual_seed(0)  # learned parts draw their first weights here
        self.mechanism = card.build(**(card.example if settings is None else settings))
        if isinstance(self.mechanism, nn.Module):
            self.mechanism = self.mechanism.to(device).eval()
        self.form = form_of(card)
        decision = {Kind.POSITION: "positions", Kind.HEADS: "heads"}.get(card.kind)
        self.call: Any = self.mechanism if decision is None else Attention(**{decision: self.mechanism})

    def require(self, *capabilities: str) -> None:
        """Skip with the capability the card lacks."""
        for capability in capabilities:
            if capability not in self.card.supports:
                raise NotApplicable(f"the card does not list {capability!r}")

    def require_causal(self) -> None:
        """Skip if causal self-attention is not among the card's patterns."""
        if Pattern.CAUSAL_SELF not in self.card.patterns:
            raise NotApplicable("not defined for causal self-attention")

    @property
    def can_backward(self) -> bool:
        """Whether the card lists gradients."""
        return "backward" in self.card.supports

    @property
    def causal(self) -> bool:
        """Whether problems are causal by default."""
        return Pattern.CAUSAL_SELF in self.card.patterns

    def problem(self, **sizes: Any) -> Problem:
        """A problem this mechanism is defined for."""
        if "gqa" not in self.card.supports:
            sizes.setdefault("groups", sizes.get("heads", 4))
        sizes.setdefault("causal", self.causal)
        return make_problem(device=self.device, **sizes)

    def run(self, problem: Problem, impl: str = "auto") -> Tensor:
        """The output `[B, H, M, E]` of a mechanism of the form "pairwise"."""
        if isinstance(self.mechanism, nn.Module):
            self.mechanism.to(problem.q.dtype)
        if self.card.kind is not Kind.MIXER:
            return self.call(*problem.leaves, geometry=problem.geometry, impl=impl)
        if impl == "reference":
            raise NotApplicable("a mixer has one form here; its oracle in tests/oracles judges it")
        return self.call(*problem.leaves, geometry=problem.geometry)

    def dense(self, problem: Problem, impl: str = "auto") -> Tensor:
        """Exact softmax attention on the same problem."""
        return attend(
            *problem.leaves, causal=problem.geometry.causal, q_segments=problem.geometry.q_segments,
            kv_segments=problem.geometry.kv_segments, impl=impl,
        )  # fmt: skip

    def frozen(self, problem: Problem) -> Callable[..., Any]:
        """For a selector, the engine with the pairs it chose on `problem` held fixed; else the mechanism itself."""
        if self.card.kind is Kind.SELECTOR:
            return engine_of(self.mechanism.pattern(problem.q.detach(), problem.k.detach(), problem.geometry))
        return lambda q, k, v, impl="auto": self.run(Problem(q, k, v, problem.geometry), impl)


def engine_of(chosen: BlockLayout | TokenIndex | Boxes) -> Callable[..., Any]:
    """The engine that runs `chosen`, as a function of q, k, v."""
    engine: Any = block_attend if isinstance(chosen, BlockLayout) else gather_attend
    return lambda q, k, v, **options: engine(q, k, v, chosen, **options)


def split_keys(chosen: BlockLayout | TokenIndex | Boxes, at: int) -> list[tuple[slice, BlockLayout | TokenIndex]]:
    """The choice restricted to keys before and from `at` (a multiple of the block size), each over its own keys."""
    parts: list[tuple[slice, BlockLayout | TokenIndex]] = []
    chosen = chosen.to_index() if isinstance(chosen, Boxes) else chosen
    for keys in (slice(0, at), slice(at, chosen.keys)):
        size = keys.stop - keys.start
        if isinstance(chosen, BlockLayout):
            mask = chosen.to_dense()[..., keys]
            parts.append((keys, BlockLayout.from_dense(mask, chosen.block)))
            continue
        inside = (chosen.indices >= keys.start) & (chosen.indices < keys.stop)
        if chosen.causal:
            raise NotApplicable("its token lists are causal inside a group, which a key shard would shift")
        mine = torch.where(inside, chosen.indices - keys.start, -1)
        parts.append((keys, TokenIndex(mine, chosen.queries, size, chosen.group)))
    return parts


def segments_of(lengths: list[list[int]], total: int, device: str) -> Tensor:
    """Segment ids `[B, total]` of right-aligned packed lengths; what is left over in front is padding, -1."""
    rows = []
    for sizes in lengths:
        ids = [-1] * (total - sum(sizes))
        for number, size in enumerate(sizes):
            ids += [number] * size
        rows.append(ids)
    return torch.tensor(rows, device=device)


def packed(problem: Problem, ids: Tensor) -> Problem:
    """The problem with these segments on both sides."""
    geometry = Geometry(causal=problem.geometry.causal, q_segments=ids, kv_segments=ids)
    return Problem(problem.q, problem.k, problem.v, geometry)
