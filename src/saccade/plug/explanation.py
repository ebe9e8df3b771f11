"""What a recipe put where, and what really ran."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from saccade.ops.dispatch import density_of
from saccade.plug.choices import label
from saccade.plug.recipe import PHASES
from saccade.plug.route import HeadsReport, Route
from saccade.plug.state import STATE, CallReport, LayerState


@dataclass(frozen=True)
class Row:
    """Some heads of a layer in one phase.

    Args:
        layer: Name of the module.
        phase: "prefill" or "decode".
        heads: "all", or query heads.
        mechanism: Installed mechanism, or "dense".
        settings: Its settings in the recipe.
        ran: Whether this phase has run since `apply` (with `record=True`).
        queries: Queries of its last call, or None if it has not run.
        keys: Keys of its last call.
        engine: Engine and implementation that ran, with its instruction set if in C++, or the model's own attention.
        density: Fraction of the pairs that were computed, or None where the engine does not say.
        select_seconds: Time spent choosing the pairs.
        refused: Faster implementations of the engine that were passed over, and why.
        fallback: Why dense attention ran instead of the mechanism, or None.
        rule: The recipe's own rule by which dense attention ran, or None.
        seconds: Time of the whole layer's attention in that call.
        cache: Policy of the layer's key/value cache, in words: the one that ran or, before that, the recipe's.
        kept: Tokens that the cache held after that call, mean over batch and key/value heads; None if it is not paged.
        cache_bytes: Bytes of memory that these took.
        dtype: What the recipe has the attention computed in, or None for the model's dtype.
    """

    layer: str
    phase: str
    heads: Literal["all"] | tuple[int, ...]
    mechanism: str
    settings: dict[str, Any]
    ran: bool = False
    queries: int | None = None
    keys: int | None = None
    engine: str = ""
    density: float | None = None
    select_seconds: float = 0.0
    refused: dict[str, str] | None = None
    fallback: str | None = None
    rule: str | None = None
    seconds: float = 0.0
    cache: str | None = None
    kept: float | None = None
    cache_bytes: int | None = None
    dtype: str | None = None


CACHE_HEAD = ("cache", "tokens kept", "bytes")
"""Columns that are shown where a layer has a cache of its own."""


@dataclass(frozen=True)
class Explanation:
    """What is installed in a model and what ran in the last forward of each phase; prints as a table.

    Args:
        model: Class of the model.
        applied: Whether a recipe is applied.
        former: The attention implementation that dense layers use, the model's own.
        rows: One per layer, phase and group of heads.
    """

    model: str
    applied: bool
    former: str
    rows: tuple[Row, ...]

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        """Rows whose mechanism did not run."""
        return tuple(row for row in self.rows if row.fallback is not None)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.applied:
            return f"{self.model}: no recipe is applied; attention is {self.former!r}"
        cached = any(row.cache is not None for row in self.rows)
        head: tuple[str, ...] = (
            "layer",
            "phase",
            "heads",
            "installed",
            "ran",
            "density",
            "select ms",
            "M x N",
            "dense because",
        )
        head += CACHE_HEAD * cached
        lines = [head, *(_cells(row) + _cache_cells(row) * cached for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([f"{self.model}, dense = {self.former!r}", *table])


def explain(model: nn.Module) -> Explanation:
    """What the recipe applied to `model` installed, and what ran last, per layer, phase and group of heads."""
    states: list[LayerState] = [module.__dict__[STATE] for module in model.modules() if STATE in module.__dict__]
    rows = tuple(row for state in states for phase in PHASES for row in _rows(state, phase))
    former = (
        states[0].former_name if states else str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    )
    return Explanation(type(model).__name__, bool(states), former, rows)


def _rows(state: LayerState, phase: str) -> list[Row]:
    routes, last = state.routes.get(phase, ()), state.last.get(phase)
    if last is None:
        return [Row(state.name, phase, **_installed(route), cache=state.policy) for route in routes]
    return [_row(state, phase, route, last, report) for route, report in zip(routes, last.heads, strict=True)]


def _installed(route: Route) -> dict[str, Any]:
    choice = route.choice
    return {
        "heads": choice.heads,
        "mechanism": choice.mechanism,
        "settings": dict(choice.settings),
        "dtype": choice.dtype,
    }


def _row(state: LayerState, phase: str, route: Route, last: CallReport, report: HeadsReport) -> Row:
    engines = [run for run in report.runs if run.op != "select"]
    return Row(
        state.name,
        phase,
        **_installed(route),
        ran=True,
        queries=last.queries,
        keys=last.keys,
        engine=" + ".join(map(str, engines)) if engines else f"model's {state.former_name}",
        density=density_of(report.runs),
        select_seconds=sum(run.select_seconds for run in report.runs),
        refused={name: reason for run in engines for name, reason in run.refused.items()},
        fallback=report.fallback,
        rule=report.rule,
        seconds=last.seconds,
        cache=state.policy if last.cache is None else last.cache.policy,
        kept=None if last.cache is None else float(last.cache.lengths.double().mean()),
        cache_bytes=None if last.cache is None else last.cache.nbytes,
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.layer,
        row.phase,
        row.heads if isinstance(row.heads, str) else ",".join(map(str, row.heads)),
        label(row.mechanism, row.settings, row.dtype),
        row.engine if row.ran else "not yet",
        "" if row.density is None else f"{row.density:.3f}",
        f"{row.select_seconds * 1e3:.1f}" if row.select_seconds else "",
        f"{row.queries} x {row.keys}" if row.ran else "",
        next((reason for reason in (row.fallback, row.rule) if reason is not None), ""),
    )


def _cache_cells(row: Row) -> tuple[str, ...]:
    if row.cache is None:
        return "", "", ""
    if row.kept is None or row.cache_bytes is None:
        return row.cache, "not in use: pass recipe.make_cache(model)" if row.ran else "", ""
    return row.cache, f"{row.kept:,.1f}", f"{row.cache_bytes:,}"
