"""Pictures of comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.bench.cache import CacheBench, CacheRow
from saccade.bench.cache_quality import PROTOCOLS
from saccade.bench.compare import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {"held": "bytes held", "read": "bytes read in a step"}
"""What policies save: those that select read less, the others hold less."""


def plot_comparison(result: Comparison, path: str | Path) -> None:
    """Error against time, one series per mechanism, dense attention as a line.

    Args:
        result: What `compare` returned.
        path: Picture to write; its ending fixes the format.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = _figure((7, 4.2))
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.label.partition("(")[0] for row in result.rows):
        rows = [row for row in result.rows if row.label.partition("(")[0] == name]
        axes.plot([1e3 * row.seconds for row in rows], [row.error for row in rows], marker="o", label=name)
    axes.axvline(1e3 * result.dense.seconds, color="grey", ls="--", label="dense")
    axes.set(xlabel="time of one call, ms", ylabel="relative output error", title=result.problem)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path)


def plot_caches(result: CacheBench, path: str | Path) -> None:
    """Quality against bytes: policies that hold less on the left, those that read less on the right; text stays text.

    Args:
        result: What `bench_cache` returned.
        path: Picture to write; its ending fixes the format.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    measures: list[tuple[str, Callable[[CacheRow], float | None]]] = [
        ("rise of perplexity, %", lambda row: None if row.ratio is None else 100 * (row.ratio - 1)),
        *(
            (f"log-probability of answers\nquestion-{name}, nats", lambda row, name=name: row.nats.get(name))
            for name in PROTOCOLS
        ),
    ]
    figure = _figure((12, 4.0 * len(measures)))
    from matplotlib import rc_context

    grid: Any = figure.subplots(len(measures), len(AXES), sharex=True, sharey="row")
    for column, axis in enumerate(AXES):
        rows = [row for row in result.table if row.effects and ("selecting" in row.effects) == (axis == "read")]
        for number, (label, measure) in enumerate(measures):
            _panel(grid[number][column], rows, axis, measure)
            grid[number][column].set_ylabel(label if column == 0 else "")
        grid[0][column].set_title("packed or evicted" if axis == "held" else "selected while decoding")
        grid[0][column].set_yscale("symlog", linthresh=2)
        grid[-1][column].set_xlabel(f"{AXES[axis]}, part of dense attention's")
        if rows:
            grid[0][column].legend(fontsize=6, loc="upper right", labelspacing=0.25)
    figure.suptitle(", ".join(f"{name} {value}" for name, value in result.about.items()), fontsize=8)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "saccade"}):
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _panel(axes: Axes, rows: Sequence[CacheRow], axis: str, measure: Callable[[CacheRow], float | None]) -> None:
    """One line per policy; the same policy has the same colour and sign in all panels."""
    names = list(dict.fromkeys(row.name for row in rows))
    for number, name in enumerate(names):
        points = [
            (row.measured["text"][axis], value)
            for row in rows
            if row.name == name and "text" in row.measured and (value := measure(row)) is not None
        ]
        sign, line = "osD^vP*X<>"[number // 10], "" if " bits" in name else "-"
        axes.plot(*zip(*sorted(points), strict=True), marker=sign, ls=line, ms=5, color=f"C{number % 10}", label=name)
    axes.axhline(0, color="grey", ls="--", lw=1)
    axes.grid(visible=True, alpha=0.3)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'saccade[report]'") from error
    return Figure(figsize=size, layout="constrained")
