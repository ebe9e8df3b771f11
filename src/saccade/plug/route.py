"""One layer's heads on their mechanisms: which heads run what, and what happens where a mechanism cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.catalog import get
from saccade.mechanisms.base import Kind, Selector, require_pattern
from saccade.ops import RunRecord, attend, block_attend, gather_attend, recording
from saccade.ops.dispatch import record
from saccade.plug.masks import Reading
from saccade.plug.recipe import DENSE, ENGINES, Choice
from saccade.plug.strict_json import RecipeError
from saccade.types import BlockLayout

KINDS = (Kind.SELECTOR, Kind.SCORE, Kind.INTERVENTION)
"""Kinds of mechanism that can stand in for a pretrained layer's attention."""


@dataclass(frozen=True)
class Extras:
    """What a model adds to plain softmax attention.

    Args:
        scale: Factor on q k^T; None means D^-0.5.
        softcap: Scores become softcap * tanh(score / softcap).
        sinks: `[H]`, a logit per head beside those of the keys.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Route:
    """Some heads and the mechanism they use.

    Args:
        choice: As in the recipe.
        mechanism: The mechanism built from it, or None for dense attention.
        heads: Query heads, or None for all.
        kv_heads: Key/value heads for these, in order: as many as the query heads or a divisor; None for all.
        rule: Why the recipe itself makes this call dense, or None.
        dtype: What queries, keys and values are rounded to; None leaves them as they are.
    """

    choice: Choice
    mechanism: Any | None
    heads: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None
    rule: str | None = None
    dtype: torch.dtype | None = None

    @property
    def as_before(self) -> bool:
        """Whether the model's former attention may run it: dense attention that was not asked of Saccade's engine."""
        asked = self.choice.mechanism == DENSE and self.choice.settings.get("engine", ENGINES[0]) != ENGINES[0]
        return self.mechanism is None and not asked

    @property
    def changes(self) -> bool:
        """Whether it computes anything but dense attention in the model's dtype."""
        return self.mechanism is not None or self.dtype is not None

    def round(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in the dtype that it computes in."""
        return (q, k, v) if self.dtype is None else (q.to(self.dtype), k.to(self.dtype), v.to(self.dtype))

    def at(self, keys: int) -> Route:
        """The route of a call with so many keys: dense, in the model's dtype, below the choice's `min_tokens`."""
        if not self.changes or keys >= self.choice.min_tokens:
            return self
        return replace(self, mechanism=None, rule=f"dense below {self.choice.min_tokens:,} tokens", dtype=None)

    def report(self, fallback: str | None = None) -> HeadsReport:
        """A report to fill in."""
        return HeadsReport(self.choice.heads, self.choice.mechanism, fallback, self.rule)


@dataclass
class HeadsReport:
    """What some heads of a layer did in one call.

    Args:
        heads: "all", or query heads.
        mechanism: Name in the recipe.
        fallback: Why dense attention ran instead, or None if the mechanism ran.
        rule: The recipe's own rule by which dense attention ran, or None.
        runs: Engine calls; empty if the model's former attention ran.
    """

    heads: Literal["all"] | tuple[int, ...]
    mechanism: str
    fallback: str | None = None
    rule: str | None = None
    runs: list[RunRecord] = field(default_factory=list)


def build_route(choice: Choice, heads: int | None, kv_heads: int | None) -> Route:
    """The route of a choice, in a layer with these numbers of query and key/value heads.

    Args:
        choice: As in the recipe.
        heads: Query heads of the layer, or None if unknown.
        kv_heads: Its key/value heads, or None if unknown.

    Returns:
        The route.

    Raises:
        ValueError: If the mechanism or a setting is unknown or out of range, or the mechanism is not of a kind that can
            stand in for a pretrained layer's attention.
    """
    mechanism = None
    if choice.mechanism != DENSE:
        card = get(choice.mechanism)
        if card.kind not in KINDS:
            raise RecipeError(
                f"mechanism={card.name!r} is of kind {card.kind}: expected one of {', '.join(KINDS)} in a recipe"
            )
        # `Card.build` without settings gives the card's example, a recipe without settings means the defaults.
        mechanism = card.build(**choice.settings) if choice.settings else card.target()
    dtype = None if choice.dtype is None else getattr(torch, choice.dtype)
    if choice.heads == "all":
        return Route(choice, mechanism, dtype=dtype)
    if heads is None or kv_heads is None:
        raise RecipeError(f"heads={choice.heads}: the model's config does not say how many heads a layer has")
    chosen = tuple(choice.heads)
    if chosen == tuple(range(heads)):
        return Route(choice, mechanism, dtype=dtype)
    reads = [head // (heads // kv_heads) for head in chosen]
    distinct = sorted(set(reads))
    even = len({reads.count(head) for head in distinct}) == 1
    return Route(choice, mechanism, chosen, tuple(distinct if even else reads), dtype=dtype)


def run_routes(
    routes: tuple[Route, ...], q: Tensor, k: Tensor, v: Tensor, reading: Reading, extras: Extras, keep_records: bool
) -> tuple[Tensor, list[HeadsReport]]:
    """Attention of all heads, `[B, H, M, E]`, and what each group of heads did."""
    k, v = k[:, :, : reading.keys], v[:, :, : reading.keys]
    done = [
        _run(route, *parts, reading, of_heads, keep_records)
        for route, parts, of_heads in split(routes, q, k, v, extras)
    ]
    return join(routes, [out for out, _ in done]), [report for _, report in done]


def split(
    routes: tuple[Route, ...], q: Tensor, k: Tensor, v: Tensor, extras: Extras
) -> Iterator[tuple[Route, tuple[Tensor, Tensor, Tensor], Extras]]:
    """Each route with the queries, keys and values of its heads, and the extras."""
    for route in routes:
        sinks = extras.sinks if extras.sinks is None else take(extras.sinks, route.heads, 0)
        parts = take(q, route.heads, 1), take(k, route.kv_heads, 1), take(v, route.kv_heads, 1)
        yield route, parts, Extras(extras.scale, extras.softcap, sinks)


def join(routes: tuple[Route, ...], outputs: list[Tensor]) -> Tensor:
    """What the routes gave, `[B, heads, ...]` each, as `[B, H, ...]` in the order of the heads."""
    if len(outputs) == 1:
        return outputs[0]
    order = [head for route in routes for head in route.heads or ()]
    return torch.cat(outputs, 1).index_select(1, torch.tensor(order, device=outputs[0].device).argsort())


def take(tensor: Tensor, indices: tuple[int, ...] | None, dim: int) -> Tensor:
    """The given places of `dim`: a view where they are consecutive."""
    if indices is None:
        return tensor
    if indices == tuple(range(indices[0], indices[-1] + 1)):
        return tensor.narrow(dim, indices[0], len(indices))
    return tensor.index_select(dim, torch.tensor(indices, device=tensor.device))


def refusal(mechanism: Any, q: Tensor, k: Tensor, reading: Reading, extras: Extras) -> str | None:
    """Why the mechanism cannot run here, or None."""
    card, geometry = mechanism.card, reading.geometry
    if reading.window is not None:
        return f"the layer has a sliding window of {reading.window} tokens of its own"
    if geometry.q_segments is not None and "segments" not in card.supports:
        return f"{card.name} does not support padding and packed sequences"
    if extras.softcap is not None or extras.sinks is not None:
        what = "soft-capped scores" if extras.softcap is not None else "attention sinks"
        if type(mechanism).__call__ is not Selector.__call__:
            return f"{card.name} does not support the model's {what}"
    if torch.is_grad_enabled() and q.requires_grad and "backward" not in card.supports:
        return f"{card.name} has no backward"
    try:
        require_pattern(card, q, k, geometry)
    except ValueError as error:
        return str(error)
    return None


def _run(
    route: Route, q: Tensor, k: Tensor, v: Tensor, reading: Reading, extras: Extras, keep_records: bool
) -> tuple[Tensor, HeadsReport]:
    """One group of heads; dense attention on the same pairs where its mechanism cannot run."""
    report = route.report()
    if route.mechanism is not None:
        report.fallback = refusal(route.mechanism, q, k, reading, extras)
    if not keep_records or torch.compiler.is_compiling():
        return _attention(route, q, k, v, reading, extras, report), report
    with recording() as runs:
        out = _attention(route, q, k, v, reading, extras, report)
    report.runs = runs
    for entry in runs:
        record(entry)
    return out, report


def _attention(
    route: Route, q: Tensor, k: Tensor, v: Tensor, reading: Reading, extras: Extras, report: HeadsReport
) -> Tensor:
    if route.mechanism is not None and report.fallback is None:
        try:
            return _mechanism(route.mechanism, *route.round(q, k, v), reading, extras).to(q.dtype)
        except ValueError as error:
            # A mechanism may find only now that these lengths or shapes are not for it.
            report.fallback = str(error)
    geometry, window = reading.geometry, reading.window
    dense = route if route.mechanism is None else replace(route, dtype=None)  # what stands in for one is as the model
    return attend(
        *dense.round(q, k, v), causal=geometry.causal, window=None if window is None else (window - 1, 0),
        q_segments=geometry.q_segments, kv_segments=geometry.kv_segments, softcap=extras.softcap, sinks=extras.sinks,
        scale=extras.scale,
    ).to(q.dtype)  # fmt: skip


def _mechanism(mechanism: Any, q: Tensor, k: Tensor, v: Tensor, reading: Reading, extras: Extras) -> Tensor:
    if "gqa" not in mechanism.card.supports and k.shape[1] != q.shape[1]:
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    if extras.softcap is None and extras.sinks is None:
        out: Tensor = mechanism(q, k, v, geometry=reading.geometry, scale=extras.scale)
        return out
    chosen = mechanism.pattern(q.detach(), k.detach(), reading.geometry)
    engine: Any = block_attend if isinstance(chosen, BlockLayout) else gather_attend
    return engine(q, k, v, chosen, softcap=extras.softcap, sinks=extras.sinks, scale=extras.scale)
