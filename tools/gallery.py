"""Pictures of what every selector chooses, docs/gallery.md and docs/gallery/*.svg, from the registry.

With --check only say whether every picture is there and was drawn with the settings of today; bits of a picture may
depend on the machine where scores tie, so that they are not compared.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from saccade.bench import random_problem
from saccade.catalog import Card, cards
from saccade.mechanisms.where._regions import Plan, RegionSelector
from saccade.types import Geometry, Kind, Pattern

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"
FOLDER = PAGE.with_suffix("")

SEQUENCE = Geometry(causal=True)
IMAGE = Geometry(grid=(12, 12))
VIDEO = Geometry(grid=(4, 6, 6))
MIXED = Geometry(grid=(10, 10), causal=True, prefix=12, suffix=32)
TOKENS = 144
"""Tokens of every picture, beside text."""

GEOMETRIES: dict[str, Geometry] = {
    **dict.fromkeys(("asa", "draft", "rectified", "svg", "svg2", "svg_ear", "vmoba"), VIDEO),
    "ee_mllm": MIXED,
    "neighbor_aware": Geometry(grid=MIXED.grid, prefix=MIXED.prefix, suffix=MIXED.suffix),
    "neighborhood": IMAGE,
    "arrow": Geometry(),
}
"""Where the kinds of pattern that a card lists do not say it."""

SETTINGS: dict[str, dict[str, Any]] = {
    "draft": {"tile": (3, 3), "density": 0.3, "block": 16},
    "swin": {"window": 4, "shift": 2, "block": 8},
    "prefix_sharing": {"lengths": ((40, 32, 24), (12, 20, 16)), "block": 16},
    "rectified": {"top_p": 0.25, "least": 0.05, "neighbors": False, "block": 12},
    "neighbor_aware": {"window": 5, "causal_text": True, "block": 16},
    "sale": {"threshold": 0.9, "block_q": 16, "block_k": 8, "local": 16},
    "maxvit": {"size": 4, "form": "grid", "block": 8},
    "halonet": {"size": 4, "halo": 2, "block": 8},
    "uniba": {"size": 4, "block": 8},
    "cswin": {"stripe": 3, "block": 8},
}
"""Where a card's example does not fit the picture."""

SIDE, GAP, TOP = 240, 36, 22
KEPT, HIDDEN, QUERY, FRAME, PAPER = "#1f5fa8", "#e4e4e4", "#e07b00", "#888888", "#ffffff"


def drawn() -> list[Card]:
    """The cards that have a picture."""
    return [card for card in cards() if card.kind is Kind.SELECTOR]


def geometry_of(card: Card) -> Geometry:
    """What the picture is drawn on."""
    if card.name in GEOMETRIES:
        return GEOMETRIES[card.name]
    return SEQUENCE if Pattern.CAUSAL_SELF in card.patterns else IMAGE


def settings_of(card: Card) -> dict[str, Any]:
    """What the mechanism is built with."""
    return SETTINGS.get(card.name, dict(card.example))


def words(card: Card) -> str:
    """What is drawn, in words: it changes whenever the picture has to."""
    geometry = geometry_of(card)
    place = "a causal sequence" if geometry.grid is None else f"a grid of {' x '.join(map(str, geometry.grid))} tokens"
    if geometry.grid is None and not geometry.causal:
        place = "a sequence"
    if geometry.prefix or geometry.suffix:
        place += f" with {geometry.prefix} tokens of text before and {geometry.suffix} behind it"
    return f"{card.name}({', '.join(f'{k}={json.dumps(v)}' for k, v in settings_of(card).items())}) on {place}"


def masks(card: Card) -> torch.Tensor:
    """Who sees whom: bool `[heads, N, N]`, heads that look alike left out."""
    geometry = geometry_of(card)
    tokens = TOKENS if geometry.grid is None else (geometry.grid_tokens or 0) + geometry.prefix + geometry.suffix
    on_grid = geometry.grid if geometry.prefix + geometry.suffix == 0 else None
    q, k, _ = random_problem((1, 4, 2, tokens, 16), grid=on_grid)
    torch.manual_seed(0)
    mechanism = card.build(**settings_of(card))
    mask = mechanism.pattern(q, k, geometry).to_dense().expand(1, 4, -1, -1)[0]
    if isinstance(mechanism, RegionSelector):
        mask = _in_place(mask, mechanism.plan(q, k, geometry))
    if geometry.causal:
        mask = mask & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    different = [head for head in range(len(mask)) if not any(torch.equal(mask[head], mask[e]) for e in range(head))]
    return mask[different[:2]]


def _in_place(mask: torch.Tensor, plan: Plan) -> torch.Tensor:
    """A choice among tokens that were moved, by the places that they came from."""
    rows, columns = (
        x.order[0].argsort(-1).repeat_interleave(len(mask) // x.order.shape[1], 0) for x in (plan.rows, plan.columns)
    )
    mask = mask.take_along_dim(rows[:, :, None].expand_as(mask), 1)
    return mask.take_along_dim(columns[:, None].expand_as(mask), 2)


def rectangles(mask: torch.Tensor) -> Iterator[tuple[int, int, int, int]]:
    """`(x, y, width, height)` of rectangles that cover what is True, none twice."""
    above: dict[tuple[int, int], int] = {}
    for y, row in enumerate([*mask.tolist(), [False] * mask.shape[1]]):
        edges = [x for x in range(len(row) + 1) if (x < len(row) and row[x]) != (x > 0 and row[x - 1])]
        runs = set(zip(edges[::2], edges[1::2], strict=True))
        for run in [run for run in above if run not in runs]:
            yield run[0], above[run], run[1] - run[0], y - above.pop(run)
        for run in sorted(runs):
            above.setdefault(run, y)


def area(mask: torch.Tensor, colour: str) -> str:
    """What is True, in one colour, a cell a unit."""
    path = "".join(f"M{x} {y}h{w}v{h}h-{w}z" for x, y, w, h in rectangles(mask))
    return f'<path fill="{colour}" d="{path}"/>'


def label(x: float, y: float, text: str, more: str = "") -> str:
    """A line of text, its middle at x."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle"{more}>{text}</text>'


def panel(left: float, title: str, height: int, width: int, *areas: str) -> str:
    """Areas of `height` x `width` cells in a frame."""
    tall = SIDE * height / max(height, width)
    wide = SIDE * width / max(height, width)
    return (
        f'{label(left + wide / 2, TOP - 8, title)}<g transform="translate({left:g} {TOP}) scale({wide / width:.6g})">'
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>{"".join(areas)}</g>'
        f'<rect x="{left:g}" y="{TOP}" width="{wide:g}" height="{tall:g}" fill="none" stroke="{FRAME}"/>'
    )


def matrix(left: float, mask: torch.Tensor, geometry: Geometry, name: str) -> str:
    """Queries down, keys to the right."""
    size = len(mask)
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1) if geometry.causal else torch.zeros(size, size)
    share = float(mask.sum()) / (size * (size + 1) / 2 if geometry.causal else size * size)
    middle = TOP + SIDE / 2
    turned = f' transform="rotate(-90 {left - 8:g} {middle:g})"'
    return (
        panel(left, f"{name}: {share:.0%} kept", size, size, area(hidden.bool() & ~mask, HIDDEN), area(mask, KEPT))
        + label(left + SIDE / 2, TOP + SIDE + 15, "keys →")
        + label(left - 8, middle, "← queries", turned)
    )


def neighbourhood(left: float, mask: torch.Tensor, geometry: Geometry) -> str:
    """What a query in the middle of the grid sees, on the grid; frames of a video beside and under each other."""
    grid = geometry.grid or (len(mask),)
    at = geometry.prefix
    for axis, size in enumerate(grid):
        inner = 1
        for later in grid[axis + 1 :]:
            inner *= later
        at += (size - 1) // 2 * inner
    seen = mask[at, geometry.prefix : geometry.prefix + (geometry.grid_tokens or 0)].view(grid)
    own = torch.zeros_like(seen)
    own.view(-1)[at - geometry.prefix] = True
    gaps = torch.zeros_like(seen)
    title = "keys that the orange query sees"
    if len(grid) == 3:
        seen, own, gaps = (_frames(x, fill=fill) for x, fill in ((seen, False), (own, False), (gaps, True)))
        title += ", by frame"
    areas = (area(gaps, HIDDEN), area(seen & ~own, KEPT), area(own, QUERY))
    return panel(left, title, *seen.shape, *areas)


def _frames(x: torch.Tensor, *, fill: bool) -> torch.Tensor:
    """Frames `[T, h, w]`, two in a row, with a line of `fill` between."""
    gap = [torch.nn.functional.pad(frame, (0, 1, 0, 1), value=fill) for frame in x]
    rows = [torch.cat(gap[first : first + 2], 1) for first in range(0, len(gap), 2)]
    return torch.cat(rows)[:-1, :-1]


def picture(card: Card) -> str:
    """The picture of a card, as SVG."""
    geometry, kept = geometry_of(card), masks(card)
    panels, left = [], 22
    for place, mask in enumerate(kept):
        name = "every head" if len(kept) == 1 else f"head {place + 1}"
        panels.append(matrix(left, mask, geometry, name))
        left += SIDE + GAP
    if geometry.grid is not None:
        panels.append(neighbourhood(left, kept[0], geometry))
        left += SIDE + GAP
    width, height = left - GAP + 6, TOP + SIDE + 22
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" shape-rendering="crispEdges">\n<desc>{words(card)}</desc>\n'
        f'<rect width="100%" height="100%" fill="{PAPER}"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )


def page() -> str:
    """The page that shows them."""
    lines = [
        "# Patterns", "",
        (
            "What every selector of [the mechanisms](mechanisms.md) chooses on small inputs whose neighbours are "
            "alike and that like keys near them (`random_problem`), made by `tools/make_docs.py`. Rows are queries, "
            "columns keys: blue pairs are computed, grey ones are the future. Two heads are drawn where they differ; "
            "on a grid also what the query in the middle, orange, sees. On other inputs dynamic ones choose "
            "otherwise; `saccade show NAME --picture FILE` draws larger ones."
        ),
    ]  # fmt: skip
    groups = {"Sequences": None, "Images": 2, "Video": 3}
    for title, axes in groups.items():
        lines += ["", f"## {title}"]
        for card in drawn():
            grid = geometry_of(card).grid
            if (None if grid is None else len(grid)) == axes:
                lines += ["", f"### {card.name}", "", card.summary, ""]
                lines += [f"![Pattern of {card.name}](gallery/{card.name}.svg)", "", f"`{words(card)}`"]
    return "\n".join(lines) + "\n"


def is_current() -> bool:
    """Whether page and pictures are those of the registry; the choices themselves are not made again."""
    pictures = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.svg")}
    described = all(f"<desc>{words(card)}</desc>" in pictures.get(card.name, "") for card in drawn())
    known = pictures.keys() == {card.name for card in drawn()}
    return known and described and PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()


def write() -> None:
    """Draw everything."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.svg"):
        path.unlink()
    for card in drawn():
        (FOLDER / f"{card.name}.svg").write_text(picture(card), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(not is_current())
    write()
