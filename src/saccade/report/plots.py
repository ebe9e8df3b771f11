"""The report's figures: SVG and PNG that fit a light and a dark page at the width of a phone and of a desktop."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

WIDE, NARROW = 960, 358
"""CSS pixels of a figure on a desktop and on a phone; one SVG unit is one pixel, so letters keep their size."""

SERIES_COUNT = 12
ATTENTION_FLOOR = -6.0
"""log10 of the smallest attention that the pictures tell apart."""

# Colours that exist only to be exchanged for CSS variables in the finished SVG.
INK, SOFT, LINE = "#010203", "#040506", "#070809"
SERIES = tuple(f"#0a0b{number:02x}" for number in range(SERIES_COUNT))
_VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)
}
_MARKERS = "osD^vP"


def series(number: int) -> int:
    """Colour of the mechanism `number`; 0 is dense attention and shares its grey with no other."""
    return 0 if number == 0 else 1 + (number - 1) % (SERIES_COUNT - 1)


def layer_map(layers: Sequence[dict[str, Any]], mechanisms: Sequence[str], heads: int, *, wide: bool) -> dict[str, Any]:
    """Cells of the map of layers and heads: colour = mechanism, height of the fill = density.

    Args:
        layers: `layers` of the report.
        mechanisms: All mechanisms, dense first; their places are their colours.
        heads: Query heads of a layer.
        wide: Layers from left to right for a desktop; otherwise from top to bottom for a phone.

    Returns:
        `width`, `height`, `groups` (SVG paths `back` and `fill`, `series`, `title`) and `ticks` (`x`, `y`, `text`).
    """
    across, down = (len(layers), heads) if wide else (heads, len(layers))
    margin, top = 30.0, 20.0
    step_x = min(30.0, ((WIDE if wide else NARROW) - margin) / max(across, 1))
    step_y = min(step_x, 26.0 if wide else 18.0)
    gap = 0.06 * step_y
    inner_x, inner_y = step_x - 2 * gap, step_y - 2 * gap
    groups = []
    for layer, row in enumerate(layers):
        for choice in row["choices"]:
            density = min(max(choice["density"], 0.0), 1.0)
            full = inner_y * max(density, 0.04)
            back, fill = [], []
            for head in choice["heads"]:
                x = margin + step_x * (layer if wide else head) + gap
                y = top + step_y * (head if wide else layer) + gap
                back.append(_box(x, y, inner_x, inner_y))
                fill.append(_box(x, y + inner_y - full, inner_x, full))
            groups.append({
                "back": "".join(back), "fill": "".join(fill), "series": series(mechanisms.index(choice["mechanism"])),
                "title": f"layer {layer}, heads {runs(choice['heads'])}: {choice['label']}, density {density:.1%}",
            })  # fmt: skip
    ticks = [_tick(margin + step_x * (n + 0.5), top - 7, n, "middle") for n in _every(across, step_x, 26)]
    ticks += [_tick(margin - 8, top + step_y * (n + 0.5) + 4, n, "end") for n in _every(down, step_y, 15)]
    return {"width": margin + step_x * across, "height": top + step_y * down, "groups": groups, "ticks": ticks}


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"


def _tick(x: float, y: float, text: int, anchor: str) -> dict[str, Any]:
    return {"x": x, "y": y, "text": text, "anchor": anchor}


def _every(count: int, step: float, room: float) -> range:
    """Numbers to write on an axis so that they do not touch: all, or each 2nd, 5th, 10th, ..."""
    skip = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * step >= room)
    return range(0, count, skip)


def runs(numbers: Sequence[int]) -> str:
    """`0-3 5` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return " ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """A matplotlib figure of the house style, in pixels, and the buffer its SVG ends up in."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "saccade", "font.size": 12, "font.family": "sans-serif",
        "text.color": INK, "text.parse_math": False, "axes.labelcolor": INK, "axes.edgecolor": LINE,
        "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "axes.grid": False, "grid.color": LINE,
    }  # fmt: skip
    with mpl.rc_context(style):
        canvas = Figure(figsize=(width / 72, height / 72), layout="constrained")
        buffer = io.StringIO()
        yield canvas, buffer
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})


def finish(buffer: io.StringIO, name: str, label: str, titles: dict[str, str]) -> str:
    """The SVG ready to stand in the page.

    Args:
        buffer: What matplotlib wrote.
        name: Prefix of all its ids, unique in the page.
        label: What a screen reader says.
        titles: Texts shown under the mouse, by group id.

    Returns:
        One `<svg>` element.
    """
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    for group, title in titles.items():
        text = text.replace(f'<g id="{group}">', f"<g><title>{html.escape(title)}</title>")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"(font: [^;\"]*?px)[^;\"]*", r"\1 system-ui, sans-serif", text)
    used = set(re.findall(r'(?:url\(|xlink:href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(|xlink:href=")#', rf"\1#{name}-", text)
    text = re.sub(r' (?:width|height)="[^"]*pt"', "", text, count=2)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def damage_floor(report: dict[str, Any]) -> float:
    """Damage at the lower edge of the frontier: smaller ones, dense attention's 0 among them, are drawn on the edge."""

    def positive(*names: list[dict[str, Any]]) -> list[float]:
        return [row["damage"] for rows in names for row in rows if row["damage"] is not None and row["damage"] > 0]

    mixtures = positive(report["search"]["frontier"], report["search"]["confirmed"])
    largest = max(mixtures + positive(report["candidates"]), default=1.0)
    return min(max(min(mixtures, default=0.0) / 3, 1e-6 * largest), 1e-4 * largest) if mixtures else 1e-4 * largest


def frontier(report: dict[str, Any], mechanisms: Sequence[str], *, wide: bool) -> str:
    """Predicted damage against attention time: each candidate everywhere, the searched mixtures, the measured ones."""
    search, floor = report["search"], damage_floor(report)
    name = f"frontier-{'wide' if wide else 'narrow'}"
    known = [row for row in report["candidates"] if row["damage"] is not None and row["seconds"] is not None]
    shown = [mechanism for mechanism in mechanisms[1:] if any(row["mechanism"] == mechanism for row in known)]
    height = 460 if wide else 400 + 19 * ((len(shown) + 5) // 2)
    titles = {}
    with figure(WIDE if wide else NARROW, height) as (canvas, buffer):
        axes = canvas.add_subplot()
        axes.axvline(search["dense_seconds"], color=SOFT, lw=1.2, ls="--", zorder=1, label="time of dense attention")
        line = search["frontier"]
        heights = [max(point["damage"], floor) for point in line]
        axes.plot(
            [point["seconds"] for point in line], heights, color=INK, lw=1.4, marker=".", label="best mixture per head"
        )
        _confirmed(axes, search["confirmed"], floor)
        for number, row in enumerate(known):
            titles[f"candidate-{number}"] = f"{row['label']}: {row['seconds']:.2f} s, damage {row['damage']:.3g}"
            place = mechanisms.index(row["mechanism"])
            first = all(other["mechanism"] != row["mechanism"] for other in known[:number])
            axes.scatter(
                [row["seconds"]], [max(row["damage"], floor)], s=46, lw=0, marker=_MARKERS[place % len(_MARKERS)],
                color=SERIES[series(place)], label=row["mechanism"] if first else None, zorder=2,
                gid=f"candidate-{number}",
            )  # fmt: skip
        _scales(axes, [search["dense_seconds"], *(row["seconds"] for row in known)], floor)
        where = {"loc": "outside right upper"} if wide else {"loc": "outside lower center", "ncols": 2}
        canvas.legend(**where, fontsize=12 if wide else 11, handletextpad=0.5, columnspacing=1.2)
    return finish(buffer, name, "quality against speed of all candidates and mixtures; the tables list them", titles)


def _confirmed(axes: Any, trials: Sequence[dict[str, Any]], floor: float) -> None:
    """Mixtures measured end to end: one look for what became of each."""
    hollow = {"facecolors": "none", "edgecolors": INK}
    looks = (
        ("measured: in the recipe", lambda t: t["kept"], {"marker": "o", "s": 110, "linewidths": 2.2, **hollow}),
        ("measured: held, but slower", lambda t: t["holds"] and not t["kept"], {"marker": "o", "s": 50, **hollow}),
        ("measured: did not hold", lambda t: not t["holds"] and not t["kept"], {"marker": "x", "s": 50, "color": INK}),
    )
    for label, belongs, look in looks:
        mine = [trial for trial in trials if belongs(trial)]
        if mine:
            heights = [max(trial["damage"], floor) for trial in mine]
            axes.scatter([trial["seconds"] for trial in mine], heights, label=label, zorder=3, **look)


def _scales(axes: Any, times: Sequence[float], floor: float) -> None:
    """Logarithmic damage upwards; time from zero, or logarithmic where dense attention would be lost at the edge."""
    axes.set(xlabel="attention time of one prefill, seconds", ylabel="predicted damage", yscale="log")
    axes.set_ylim(bottom=floor * 0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if max(times) > 12 * min(times) > 0:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    axes.grid(visible=True, axis="y", lw=0.7)
    axes.set_axisbelow(True)


def attention_picture(attention: Sequence[Sequence[float]]) -> str:
    """One head's attention, log10, as the address of a PNG; the pairs that causality excludes are transparent."""
    import matplotlib as mpl

    values = np.asarray(attention, dtype=np.float64)
    colours = mpl.colormaps["viridis"](np.clip(1 - values / ATTENTION_FLOOR, 0, 1))
    return _png(colours, _causal(*values.shape))


def pattern_picture(pattern: Sequence[Sequence[float]]) -> str:
    """Share of each cell's pairs that a pattern computes as the address of a PNG: grey = none, blue = all."""
    share = np.clip(np.asarray(pattern, dtype=np.float64), 0, 1)[..., None]
    none, full = np.array([0.5, 0.5, 0.5, 0.22]), np.array([0.22, 0.5, 0.8, 1.0])
    return _png((1 - share) * none + share * full, _causal(*share.shape[:2]))


def attention_scale() -> str:
    """The colours of `attention_picture` from its floor to 1, as a CSS gradient."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    stops = ", ".join(to_hex(mpl.colormaps["viridis"](stop / 8)) for stop in range(9))
    return f"linear-gradient(to right, {stops})"


def _causal(height: int, width: int) -> np.ndarray:
    """Cells that hold at least one pair of a query and a key not after it."""
    return np.arange(width)[None] * height < (np.arange(height)[:, None] + 1) * width


def _png(colours: np.ndarray, visible: np.ndarray) -> str:
    from matplotlib.image import imsave

    colours = np.concatenate([colours[..., :3], colours[..., 3:] * visible[..., None]], axis=-1)
    unsigned: Any = {"Software": None}  # the version of matplotlib is no part of the page
    buffer = io.BytesIO()
    imsave(buffer, np.rint(255 * colours).astype(np.uint8), format="png", metadata=unsigned)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
