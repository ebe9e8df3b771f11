"""The report's figures as SVG text that takes its colours from the page, so that they fit light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Colours that exist only to be exchanged for CSS variables in the finished SVG.
INK, GRID, PAPER = "#010203", "#040506", "#070809"
SERIES = tuple(f"#0a0b{number:02x}" for number in range(12))
_VARIABLES = {INK: "var(--ink)", GRID: "var(--line)", PAPER: "var(--paper)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)
}


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """A matplotlib figure of the house style and the buffer its SVG ends up in."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "saccade", "font.size": 10, "font.family": "sans-serif",
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK,
        "axes.facecolor": "none", "figure.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "axes.grid": False, "grid.color": GRID, "savefig.facecolor": "none",
    }  # fmt: skip
    with mpl.rc_context(style):
        canvas = Figure(figsize=(width, height), layout="constrained")
        buffer = io.StringIO()
        yield canvas, buffer
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})


def finish(buffer: io.StringIO, label: str) -> str:
    """The SVG without XML prologue, scaled to its container, coloured by the page, named for a screen reader."""
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' width="[^"]*pt"', "", text, count=1)
    text = re.sub(r' height="[^"]*pt"', "", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def layer_map(layers: Sequence[dict[str, Any]], mechanisms: Sequence[str], heads: int) -> str:
    """One cell per layer and head: colour = mechanism, height of the fill = share of the causal pairs computed."""
    from matplotlib.patches import Rectangle

    count = len(layers)
    with figure(min(11.0, 2.2 + 0.27 * count), 1.3 + 0.27 * heads) as (canvas, buffer):
        axes = canvas.add_subplot()
        for column, layer in enumerate(layers):
            for choice in layer["choices"]:
                colour = SERIES[mechanisms.index(choice["mechanism"]) % len(SERIES)]
                density = min(max(choice["density"], 0.0), 1.0)
                for head in choice["heads"]:
                    axes.add_patch(Rectangle((column + 0.06, head + 0.06), 0.88, 0.88, color=colour, alpha=0.22, lw=0))
                    fill = 0.88 * max(density, 0.04)
                    axes.add_patch(Rectangle((column + 0.06, head + 0.94 - fill), 0.88, fill, color=colour, lw=0))
        axes.set(xlim=(0, count), ylim=(heads, 0), xlabel="layer", ylabel="head", aspect="equal")
        step = max(1, count // 10)
        axes.set_xticks([x + 0.5 for x in range(0, count, step)], [str(x) for x in range(0, count, step)])
        axes.set_yticks(
            [y + 0.5 for y in range(0, heads, max(1, heads // 9))],
            [str(y) for y in range(0, heads, max(1, heads // 9))],
        )
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0)
    return finish(buffer, "mechanism and density of every layer and head")


def frontier(candidates: Sequence[dict[str, Any]], search: dict[str, Any], mechanisms: Sequence[str]) -> str:
    """Predicted damage against attention time: each candidate everywhere, the searched mixtures, the confirmed ones."""
    with figure(7.2, 4.2) as (canvas, buffer):
        axes = canvas.add_subplot()
        for number, mechanism in enumerate(mechanisms):
            mine = [row for row in candidates if row["mechanism"] == mechanism and row["damage"] > 0]
            if mine:
                axes.scatter(
                    [row["seconds"] for row in mine], [row["damage"] for row in mine], s=26, lw=0,
                    color=SERIES[number % len(SERIES)], label=mechanism,
                )  # fmt: skip
        line = [point for point in search["frontier"] if point["damage"] > 0]
        axes.plot(
            [p["seconds"] for p in line], [p["damage"] for p in line], color=INK, lw=1.4, label="best mixture per head"
        )
        kept = [point for point in search["confirmed"] if point["kept"] and point["damage"] > 0]
        tried = [point for point in search["confirmed"] if not point["kept"] and point["damage"] > 0]
        axes.scatter(
            [p["seconds"] for p in tried],
            [p["damage"] for p in tried],
            marker="x",
            s=50,
            color=INK,
            label="measured, over budget",
        )
        axes.scatter(
            [p["seconds"] for p in kept],
            [p["damage"] for p in kept],
            marker="o",
            s=70,
            facecolors="none",
            edgecolors=INK,
            linewidths=1.8,
            label="measured, within budget",
        )
        axes.axvline(search["dense_seconds"], color=GRID, lw=1.2, ls="--")
        axes.annotate(
            "dense",
            (search["dense_seconds"], 0.98),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            rotation=90,
            color=INK,
        )
        axes.set(xlabel="attention time of one prefill, s", ylabel="predicted damage", yscale="log")
        axes.grid(visible=True, axis="y", lw=0.5)
        canvas.legend(loc="outside right upper", fontsize=8.5)
    return finish(buffer, "quality against speed of all candidates")


def time_split(rows: Sequence[dict[str, Any]]) -> str:
    """Stacked bars: attention kernels, choosing what to compute, the rest of the model."""
    with figure(7.2, 0.9 + 0.5 * len(rows)) as (canvas, buffer):
        axes = canvas.add_subplot()
        parts = (
            ("kernel", "attention", SERIES[0]),
            ("select", "index building", SERIES[2]),
            ("rest", "rest of the model", GRID),
        )
        left = [0.0] * len(rows)
        for key, label, colour in parts:
            widths = [row[key] for row in rows]
            axes.barh([row["name"] for row in rows], widths, left=left, color=colour, label=label, height=0.55)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, total in enumerate(left):
            axes.text(total, place, f"  {total:.1f} s", va="center", color=INK)
        axes.set(xlabel="seconds of one prefill", xlim=(0, max(left) * 1.15))
        axes.invert_yaxis()
        axes.tick_params(length=0)
        canvas.legend(loc="outside upper left", ncols=3, fontsize=9)
    return finish(buffer, "time of a prefill by part")


def attention_and_pattern(example: dict[str, Any]) -> str:
    """A head's real attention (left, log scale) beside the pairs its pattern computes (right)."""
    with figure(5.4, 2.9) as (canvas, buffer):
        left, right = canvas.subplots(1, 2)
        left.imshow(example["attention"], cmap="viridis", interpolation="nearest")
        left.set_title("attention, log scale", fontsize=9)
        right.imshow(example["pattern"], cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        right.set_title(f"computed: {example['density']:.0%}", fontsize=9)
        for axes in (left, right):
            axes.set(xticks=[], yticks=[])
            for side in axes.spines.values():
                side.set_visible(False)
        left.set_ylabel("query")
        left.set_xlabel("key")
        right.set_xlabel("key")
    return finish(buffer, f"layer {example['layer']}, head {example['head']}: attention and pattern")
