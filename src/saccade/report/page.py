"""The report page: one HTML file, no scripts, no requests, right in light and dark and at any width."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from saccade.report import plots


def render(report: dict[str, Any]) -> str:
    """The page for a report (see `saccade.tune.report_data` for its fields).

    Raises:
        ImportError: If jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs more packages: pip install 'saccade[report]'") from error
    text = files("saccade.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"seconds": seconds, "bytes": megabytes, "percent": percent}
    mechanisms = list(dict.fromkeys(["dense", *(row["mechanism"] for row in report["candidates"])]))
    figures = {
        "map": plots.layer_map(report["layers"], mechanisms, report["model"]["heads"]),
        "frontier": plots.frontier(report["candidates"], report["search"], mechanisms),
        "split": plots.time_split(report["time_split"]),
        "examples": [plots.attention_and_pattern(example) for example in report["examples"]],
    }
    used = [
        name
        for name in mechanisms
        if any(c["mechanism"] == name for layer in report["layers"] for c in layer["choices"])
    ]
    legend = [(name, mechanisms.index(name) % len(plots.SERIES)) for name in used]
    return environment.from_string(text).render(r=report, figures=figures, legend=legend)


def seconds(value: float | None) -> str:
    """`1.23 s`, `45 ms`, or a dash."""
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def megabytes(value: int | None) -> str:
    """`12.3 MB`, or a dash."""
    return "–" if value is None else f"{value / 1e6:,.1f} MB"


def percent(value: float | None, digits: int = 2) -> str:
    """`1.23 %`, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def write_report(report: dict[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into `folder`, each all or nothing.

    Raises:
        RuntimeError: If the disk has no room; what was there before is still there.
    """
    target = Path(folder)
    written = []
    for name, text in (("report.json", json.dumps(report, indent=1)), ("report.html", render(report))):
        path = target / name
        part = path.with_name(name + ".part")
        try:
            target.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise RuntimeError(f"{path}: cannot be written: {error.strerror}; nothing was changed") from error
        written.append(path)
    return written[0], written[1]
