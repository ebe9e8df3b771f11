"""Write docs/mechanisms.md from the registry; with --check only say whether it is current."""

import sys
from pathlib import Path

import gallery
from saccade.catalog import ROOMS, Card, cards, papers
from saccade.types import Kind

PATH = Path(__file__).parents[1] / "docs" / "mechanisms.md"


def page() -> str:
    """The whole page."""
    done = sum(any(paper.title in card.papers for card in cards()) for paper in papers())
    intro = (
        f"Made from the cards by `tools/make_docs.py`; {len(cards())} mechanisms from {done} of the {len(papers())} "
        "papers of the catalogue. `saccade show NAME` has settings, picture and laws; [the gallery](gallery.md) has "
        "all pictures, and names with one are links to it."
    )
    lines = ["# Mechanisms", "", intro]
    for room in ROOMS:
        found = [card for card in cards() if card.room == room]
        if found:
            lines += ["", f"## {room}", ""]
            lines += ["| name | what | patterns | supports | drop-in | dense when | work | paper |", "|" + "---|" * 8]
            lines += [row(card) for card in found]
            lines += [""] + [f"- `{card.name}`: {line}" for card in found for line in remarks(card)]
    return "\n".join(lines).rstrip() + "\n"


def remarks(card: Card) -> tuple[str, ...]:
    """What a reader must know beside the table."""
    return ((f"Prefill only: {card.prefill_only}",) if card.prefill_only else ()) + card.deviations


def row(card: Card) -> str:
    """A card as a table row."""
    name = f"[`{card.name}`](gallery.md#{card.name})" if card.kind is Kind.SELECTOR else f"`{card.name}`"
    cells = [
        name, card.summary,
        ", ".join(sorted(card.patterns)) or "–", ", ".join(sorted(card.supports)) or "–",
        "yes" if card.training_free else "no", card.exact_when or "never", card.complexity or "–",
        "; ".join(card.papers + card.other_papers) + f" ({card.year})",
    ]  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(arguments: list[str]) -> int:
    """Write the page, or with --check return 1 if it is not what the registry says."""
    if "--check" in arguments:
        current = PATH.exists() and PATH.read_text(encoding="utf-8") == page()
        drawn = gallery.is_current()
        print(f"{gallery.PAGE.name} is {'current' if drawn else 'out of date: run tools/make_docs.py'}")
        print(f"{PATH.name} is {'current' if current else 'out of date: run tools/make_docs.py'}")
        return not (current and drawn)
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(page(), encoding="utf-8")
    gallery.write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
