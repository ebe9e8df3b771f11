"""The card: everything Saccade knows about a mechanism beside its formula."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from saccade.catalog.papers import paper_titles
from saccade.catalog.settings import check_settings
from saccade.types import Kind, Pattern

CAPABILITIES = {
    "bias": "an additive bias on the scores",
    "dropout": "dropout on the attention weights",
    "backward": "gradients with respect to every input and weight",
    "gqa": "fewer key/value heads than query heads",
    "lse": "returning the log-sum-exp, so that partial results merge",
    "segments": "packed sequences and padding",
    "streaming": "the same output whole, in chunks and step by step",
    "chunks": "a prompt in chunks leaves a cache as one fed whole does, though decoding differs from both",
}
"""What a mechanism may support; a law that needs a missing one is skipped with that reason."""

ROOMS = (
    "where", "positions", "scores", "heads", "landmarks", "state", "cross", "mixers", "gates", "reduce", "cache",
    "steer", "diffusion", "adapt", "parallel", "probe",
)  # fmt: skip

EFFECTS = {
    "evicting": "fewer bytes of the cache are held",
    "selecting": "fewer bytes of the cache are read in a step",
    "packing": "a token is stored in fewer bytes",
    "offloading": "fewer bytes of the cache are held in the memory of the model's process",
    "mapping": "memory is taken as tokens come, less than the contiguous addresses that are reserved for them",
}
"""What a cache policy may save; law 13 measures each that a card claims."""

Settings = Mapping[str, Any]
T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Budget:
    """How much a cache policy may hold or read.

    Args:
        part: Of the tokens: those kept, or attended to where a step chooses; of 16 bits where tokens are packed.
        tokens: Of the context.
        layers: Of the model.
        rope: Base of the model's rotary embedding, or None.

    Raises:
        ValueError: If a number is out of range.
    """

    part: float
    tokens: int
    layers: int = 1
    rope: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.part <= 1:
            raise ValueError(f"part={self.part}: expected a budget above 0 and at most 1")
        for name, value in (("tokens", self.tokens), ("layers", self.layers)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")

    @property
    def count(self) -> int:
        """Tokens that are the budget's part, at least 8."""
        return max(8, round(self.part * self.tokens))


@dataclass(frozen=True)
class Card:
    """A registered mechanism.

    Args:
        name: Registry name, snake_case, that of its file.
        kind: Fixes its one method (`saccade.mechanisms.base`).
        target: The class.
        room: Its folder in `mechanisms/`.
        summary: One line.
        papers: Exact titles in the paper catalogue; several may be one algorithm.
        other_papers: Titles that are not in the catalogue.
        year: Of the first paper.
        code: The authors' repository, or "".
        patterns: Attention patterns it is defined for; empty where the notion does not apply.
        supports: Keys of `CAPABILITIES`.
        training_free: Works on pretrained weights as they are.
        exact_when: In words, the setting at which it equals dense attention; "" if there is none.
        complexity: Counted work in N, such as "N", "N log N", "N^1.5", "N^2".
        deviations: Where it departs from the paper, and why.
        heads_differ: Heads are treated differently by their number, so that their order matters.
        heads_share: The query heads of a key/value head choose together, so that GQA differs from repeated heads.
        prefill_only: In words, how a choice for earlier tokens depends on later ones; "" if it does not. Such a
            mechanism takes whole prompts (as many queries as keys), keeps neither law 4 nor law 5, and is not tuned.
        effects: Keys of `EFFECTS`: what a cache policy saves.
        example: Settings that fit a small problem; the laws build the mechanism from them.
        exact: `N -> settings` at which it equals dense attention on N tokens, or None.
        ladder: `N -> settings, ...` from the least to the most computed: what `tune` tries and what law 6 climbs.
        at_budget: What a cache policy's paper would set at a budget, or None where its rule cannot be so small.
    """

    name: str
    kind: Kind
    target: type
    room: str
    summary: str
    papers: tuple[str, ...] = ()
    other_papers: tuple[str, ...] = ()
    year: int = 0
    code: str = ""
    patterns: frozenset[Pattern] = frozenset()
    supports: frozenset[str] = frozenset()
    training_free: bool = False
    exact_when: str = ""
    complexity: str = ""
    deviations: tuple[str, ...] = ()
    heads_differ: bool = False
    heads_share: bool = False
    prefill_only: str = ""
    effects: frozenset[str] = frozenset()
    example: Settings = field(default_factory=dict)
    exact: Callable[[int], Settings] | None = None
    ladder: Callable[[int], tuple[Settings, ...]] | None = None
    at_budget: Callable[[Budget], Settings | None] | None = None

    def build(self, **settings: Any) -> Any:
        """The mechanism with `settings`, or with `example` if none are given.

        Args:
            **settings: Hyperparameters by name.

        Returns:
            An instance of `target`.

        Raises:
            ValueError: If a setting is unknown, of the wrong type or out of range, naming it.
        """
        chosen = settings or dict(self.example)
        try:
            check_settings(self.target, chosen)
            return self.target(**chosen)
        except TypeError as error:
            raise ValueError(f"{self.name}: {error}") from error


_CARDS: dict[str, Card] = {}


def register(name: str, kind: Kind, **facts: Any) -> Callable[[T], T]:
    """Class decorator that makes a mechanism known.

    Args:
        name: Registry name, that of the file.
        kind: Fixes its one method.
        **facts: The other fields of `Card`, but `target` and `room`.

    Returns:
        The decorator; it returns the class itself, with its `card`.

    Raises:
        ValueError: If the name is taken or not that of the file, or a fact is not one the catalogue knows.
    """

    def add(target: T) -> T:
        *_, room, stem = target.__module__.split(".")
        if target.__module__.startswith("saccade.") and (room not in ROOMS or stem != name):
            raise ValueError(f"name={name!r}: expected the name of its file, mechanisms/<room>/{stem}.py")
        if name in _CARDS and _CARDS[name].target.__qualname__ != target.__qualname__:
            raise ValueError(f"name={name!r}: already registered by {_CARDS[name].target}")
        card = Card(name=name, kind=kind, target=target, room=room, **facts)
        _check(card)
        _CARDS[name] = card
        target.card = card  # type: ignore[attr-defined]
        return target

    return add


def _check(card: Card) -> None:
    """Refuse facts that the rest of the house could not use."""
    unknown = [title for title in card.papers if title not in paper_titles()]
    if unknown:
        raise ValueError(f"{card.name}: papers={unknown}: expected exact titles of the paper catalogue")
    if not card.papers and not card.other_papers:
        raise ValueError(f"{card.name}: papers=(): expected at least one title")
    for capability in card.supports:
        if capability not in CAPABILITIES:
            raise ValueError(f"{card.name}: supports={capability!r}: expected one of {sorted(CAPABILITIES)}")
    if card.effects - set(EFFECTS) or bool(card.effects) != (card.kind is Kind.CACHE_POLICY):
        raise ValueError(f"{card.name}: effects={sorted(card.effects)}: expected, of a cache policy, {list(EFFECTS)}")
    if card.prefill_only and "streaming" in card.supports:
        raise ValueError(f"{card.name}: supports='streaming': expected no such claim, it is for prefill only")
    if card.exact is not None and not card.exact_when:
        raise ValueError(f"{card.name}: exact_when='': expected words for the setting that `exact` gives")


def cards() -> tuple[Card, ...]:
    """Every registered mechanism, by room and name."""
    load_mechanisms()
    return tuple(sorted(_CARDS.values(), key=lambda card: (ROOMS.index(card.room), card.name)))


def get(name: str) -> Card:
    """The card of one mechanism.

    Args:
        name: Registry name.

    Returns:
        Its card.

    Raises:
        ValueError: If there is none; suggests the nearest names.
    """
    load_mechanisms()
    if name in _CARDS:
        return _CARDS[name]
    nearest = difflib.get_close_matches(name, _CARDS, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    raise ValueError(f"unknown mechanism {name!r}{hint} `saccade list` shows all {len(_CARDS)}")


def search(
    room: str | None = None,
    pattern: Pattern | str | None = None,
    training_free: bool | None = None,
    capability: str | None = None,
    title: str | None = None,
    kind: Kind | str | None = None,
) -> tuple[Card, ...]:
    """Cards that meet every given condition.

    Args:
        room: Folder in `mechanisms/`.
        pattern: An attention pattern it is defined for.
        training_free: Whether it works on pretrained weights as they are.
        capability: A key of `CAPABILITIES` it supports.
        title: Part of the title of one of its papers, ignoring case.
        kind: Its kind.

    Returns:
        The cards, by room and name.

    Raises:
        ValueError: If `room`, `pattern`, `capability` or `kind` is not one that exists.
    """
    if room is not None and room not in ROOMS:
        raise ValueError(f"room={room!r}: expected one of {ROOMS}")
    if capability is not None and capability not in CAPABILITIES:
        raise ValueError(f"capability={capability!r}: expected one of {sorted(CAPABILITIES)}")
    for label, value, values in (("pattern", pattern, Pattern), ("kind", kind, Kind)):
        if value is not None and value not in list(values):
            raise ValueError(f"{label}={str(value)!r}: expected one of {[str(known) for known in values]}")
    wanted_pattern = None if pattern is None else Pattern(pattern)
    wanted_kind = None if kind is None else Kind(kind)
    return tuple(
        card
        for card in cards()
        if (room is None or card.room == room)
        and (wanted_pattern is None or wanted_pattern in card.patterns)
        and (training_free is None or card.training_free == training_free)
        and (capability is None or capability in card.supports)
        and (wanted_kind is None or card.kind == wanted_kind)
        and (title is None or any(title.lower() in t.lower() for t in card.papers + card.other_papers))
    )


def load_mechanisms() -> None:
    """Import every file of `saccade.mechanisms`, so that its `@register` runs; cheap after the first time."""
    package = importlib.import_module("saccade.mechanisms")
    for module in pkgutil.walk_packages(package.__path__, "saccade.mechanisms."):
        importlib.import_module(module.name)
