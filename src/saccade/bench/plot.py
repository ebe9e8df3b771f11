"""A picture of a comparison."""

from __future__ import annotations

from pathlib import Path

from saccade.bench.compare import Comparison


def plot_comparison(result: Comparison, path: str | Path) -> None:
    """Error against time, one series per mechanism, dense attention as a line.

    Args:
        result: What `compare` returned.
        path: Picture to write; its ending fixes the format.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'saccade[report]'") from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.label.partition("(")[0] for row in result.rows):
        rows = [row for row in result.rows if row.label.partition("(")[0] == name]
        axes.plot([1e3 * row.seconds for row in rows], [row.error for row in rows], marker="o", label=name)
    axes.axvline(1e3 * result.dense.seconds, color="grey", ls="--", label="dense")
    axes.set(xlabel="time of one call, ms", ylabel="relative output error", title=result.problem)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path)
