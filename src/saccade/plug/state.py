"""What is kept on a patched attention module, and what it tells of its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from saccade.plug.route import HeadsReport, Route

STATE = "_saccade"
"""Attribute of a patched module that holds its `LayerState`."""


@dataclass(frozen=True)
class CacheReport:
    """A layer's `PagedCache` after a call.

    Args:
        policy: Its policy, in words.
        lengths: Tokens of each batch entry and key/value head, int64 `[B, G]`.
        nbytes: Bytes of memory that they hold.
    """

    policy: str
    lengths: Tensor
    nbytes: int


@dataclass
class CallReport:
    """What a layer did in its last call of a phase: queries and keys, each group of heads, seconds, and its cache."""

    queries: int
    keys: int
    heads: list[HeadsReport]
    seconds: float = 0.0
    cache: CacheReport | None = None


@dataclass(frozen=True, eq=False)
class Observation:
    """What a layer's attention is about to run on.

    Args:
        layer: Name of the module.
        module: The module.
        q: `[B, H, M, D]`, positions already in.
        k: `[B, G, N, D]`.
        v: `[B, G, N, E]`.
        scale: Factor on q k^T; None means D^-0.5.
    """

    layer: str
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None


@dataclass
class LayerState:
    """What is kept on a patched module.

    Args:
        name: Name of the module in the model.
        former_name: The model's attention implementation before `apply`.
        former: Its function.
        routes: For each phase, groups of heads; empty for a layer that the recipe does not name.
        strict: Raise instead of falling back to dense attention.
        keep_records: Keep a `CallReport` of each phase's last call.
        last: These reports.
        observe: Is shown the inputs of every call.
        policy: What the recipe asks of the layer's cache, in words; None for nothing.
    """

    name: str
    former_name: str
    former: Callable[..., tuple[Tensor, Tensor | None]]
    routes: dict[str, tuple[Route, ...]] = field(default_factory=dict)
    strict: bool = False
    keep_records: bool = True
    last: dict[str, CallReport] = field(default_factory=dict)
    observe: Callable[[Observation], None] | None = None
    policy: str | None = None
