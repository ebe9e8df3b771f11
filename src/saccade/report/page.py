"""The report page: one HTML file, no scripts, no requests, right in light and dark and at any width."""

from __future__ import annotations

import contextlib
import json
import math
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from saccade.report import plots


def require_packages() -> None:
    """Check that the packages behind the page are there, so that a long run can fail before it starts.

    Raises:
        ImportError: If jinja2 or matplotlib is not installed.
    """
    for name in ("jinja2", "matplotlib"):
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(f"the report needs {name}: pip install 'saccade[report]'") from error


def render(report: dict[str, Any]) -> str:
    """The page for a report (see `saccade.tune.report_data` for its fields); equal reports give equal pages.

    Args:
        report: As in `report.json`; not changed.

    Returns:
        HTML that needs nothing outside itself.

    Raises:
        ImportError: If jinja2 or matplotlib is not installed.
    """
    require_packages()
    import jinja2

    report = plain(report)
    folder = files("saccade.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "seconds": seconds, "percent": percent, "signed": signed, "number": number, "thousands": thousands,
        "runs": plots.runs, "tight": tight,
    }  # fmt: skip
    template = environment.from_string(folder.joinpath("report.html.j2").read_text(encoding="utf-8"))
    style = folder.joinpath("report.css").read_text(encoding="utf-8")
    return template.render(r=report, style=style, figures=figures(report), **overview(report)) + "\n"


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Everything drawn, each for a desktop and for a phone where the two differ."""
    names = mechanisms(report)
    layers, heads = report["layers"], report["model"]["heads"]
    return {
        "maps": {
            name: plots.layer_map(layers, names, heads, wide=name == "wide") for name in ("wide", "narrow")
        },
        "frontiers": {name: plots.frontier(report, names, wide=name == "wide") for name in ("wide", "narrow")},
        "damage_floor": plots.damage_floor(report),
        "attention_scale": plots.attention_scale(),
        "examples": [
            {
                "attention": plots.attention_picture(example["attention"]),
                "pattern": plots.pattern_picture(example["pattern"]),
            }
            for example in report["examples"]
        ],
    }  # fmt: skip


def mechanisms(report: dict[str, Any]) -> list[str]:
    """Dense first, then the candidates' and whatever else a layer runs; the places are the colours."""
    chosen = [choice["mechanism"] for layer in report["layers"] for choice in layer["choices"]]
    return list(dict.fromkeys(["dense", *(row["mechanism"] for row in report["candidates"]), *chosen]))


def overview(report: dict[str, Any]) -> dict[str, Any]:
    """What the page says in sentences: who runs where, what was missed, what was left out for which reason."""
    names = mechanisms(report)
    choices = [choice for layer in report["layers"] for choice in layer["choices"]]
    heads = sum(len(choice["heads"]) for choice in choices)
    shares = {name: sum(len(c["heads"]) for c in choices if c["mechanism"] == name) for name in names}
    reasons: dict[str, list[str]] = {}
    for name, reason in report["left_out"].items():
        reasons.setdefault(reason, []).append(name)
    slowest = max((sum(row[key] for key in ("kernel", "select", "rest")) for row in report["time_split"]), default=1.0)
    return {
        "legend": [
            {"name": name, "series": plots.series(names.index(name)), "heads": count}
            for name, count in shares.items()
            if count
        ],
        "heads": heads,
        "dense_heads": shares["dense"],
        "exact_heads": sum(len(c["heads"]) for c in choices if c["mechanism"] == "dense" and c["dtype"] is None),
        "rounded_heads": sum(len(c["heads"]) for c in choices if c["dtype"] is not None),
        "dtypes": sorted({c["dtype"] for c in choices if c["dtype"] is not None}),
        "density": sum(c["density"] * len(c["heads"]) for c in choices) / max(heads, 1),
        "missed": [target for target in report["targets"] if not target["met"]],
        "reasons": reasons,
        "slowest": slowest,
        "places": {layer["key"]: place for place, layer in enumerate(report["layers"])},
    }


def plain(value: Any) -> Any:
    """The value with what JSON cannot hold, NaN and infinities, as None."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def signed(value: float | None) -> str:
    """`+1.23 %`, or a dash; never `-0.00 %`."""
    return "–" if value is None else f"{round(100 * value, 2) + 0.0:+.2f} %"


def number(value: float | None, form: str = ".3g") -> str:
    """The number in a form of `format`, or a dash."""
    return "–" if value is None else f"{value:{form}}"


def tight(text: str) -> str:
    """The text with no line break before a percent sign."""
    return text.replace(" %", "\u00a0%")


def thousands(value: int) -> str:
    """`8,192`."""
    return f"{value:,}"


def write_report(report: dict[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into `folder`; both are complete before either takes its place.

    Args:
        report: See `render`.
        folder: Made if it is not there.

    Returns:
        The two paths.

    Raises:
        ImportError: If jinja2 or matplotlib is not installed.
        RuntimeError: If they cannot be written; it names the file, the reason and what changed, which is
            nothing unless the last step of all failed.
    """
    target = Path(folder)
    texts = {"report.json": json.dumps(plain(report), indent=1, allow_nan=False) + "\n", "report.html": render(report)}
    parts = {target / name: target / f"{name}.part" for name in texts}
    new: list[str] = []
    path = target
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path, part in parts.items():
            part.write_text(texts[path.name], encoding="utf-8")
        for path, part in parts.items():
            part.replace(path)
            new.append(path.name)
    except OSError as error:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        changed = f"only {new[0]} is new" if new else "nothing was changed"
        raise RuntimeError(f"{path}: cannot be written: {error.strerror}; {changed}") from error
    json_path, html_path = parts
    return json_path, html_path
