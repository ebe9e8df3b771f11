"""Registering, finding and building mechanisms."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from saccade import catalog
from saccade.catalog import card as card_module
from saccade.catalog import cards, get, register, search
from saccade.types import Kind, Pattern

pytestmark = pytest.mark.quick

TITLE = "Big Bird: Transformers for Longer Sequences"


@pytest.fixture
def registry(monkeypatch):
    """The registry, put back afterwards."""
    cards()
    monkeypatch.setattr(card_module, "_CARDS", dict(card_module._CARDS))
    return card_module._CARDS


@dataclass(frozen=True)
class Toy:
    """A class with one setting."""

    size: int = 1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size}: expected at least 1")


def toy_in(module, qualname="Toy"):
    return type("Toy", (Toy,), {"__module__": module, "__qualname__": qualname})


def test_register_makes_a_card(registry):
    made = register("toy", Kind.SCORE, summary="A toy.", papers=(TITLE,))(toy_in("saccade.mechanisms.scores.toy"))
    assert get("toy") is made.card is registry["toy"]
    assert (made.card.name, made.card.kind, made.card.room) == ("toy", Kind.SCORE, "scores")
    assert made.card.build(size=3).size == 3


def test_registering_the_same_class_again_is_a_reload(registry):
    for _ in range(2):
        register("toy", Kind.SCORE, summary="", papers=(TITLE,))(toy_in("saccade.mechanisms.scores.toy"))
    assert list(registry).count("toy") == 1


@pytest.mark.parametrize(
    ("module", "name", "facts", "message"),
    [
        ("saccade.mechanisms.scores.other", "toy", {}, "name='toy': expected the name of its file, .*/other.py"),
        ("saccade.mechanisms.nowhere.toy", "toy", {}, "name='toy': expected the name of its file"),
        ("saccade.mechanisms.where.bigbird", "bigbird", {}, "name='bigbird': already registered by"),
        ("saccade.mechanisms.scores.toy", "toy", {"papers": ("No Such Paper",)}, r"toy: papers=\['No Such Paper'\]"),
        ("saccade.mechanisms.scores.toy", "toy", {"papers": ()}, r"toy: papers=\(\): expected at least one title"),
        ("saccade.mechanisms.scores.toy", "toy", {"supports": frozenset({"flying"})}, "toy: supports='flying'"),
        ("saccade.mechanisms.scores.toy", "toy", {"exact": lambda n: {}}, "toy: exact_when='': expected words"),
    ],
)
def test_register_refuses(registry, module, name, facts, message):
    before = dict(registry)
    with pytest.raises(ValueError, match=message):
        register(name, Kind.SCORE, **{"summary": "", "papers": (TITLE,), **facts})(toy_in(module, "Unheard"))
    assert registry == before


def test_titles_outside_the_catalogue_go_elsewhere(registry):
    made = register("toy", Kind.SCORE, summary="", other_papers=("No Such Paper",))
    assert made(toy_in("saccade.mechanisms.scores.toy")).card.papers == ()


def test_build_takes_settings_or_the_example(registry):
    card = register("toy", Kind.SCORE, summary="", papers=(TITLE,), example={"size": 7})(
        toy_in("saccade.mechanisms.scores.toy")
    ).card
    assert card.build().size == 7
    assert card.build(size=2).size == 2
    with pytest.raises(ValueError, match=r"toy: .*unexpected keyword argument 'colour'"):
        card.build(colour="red")
    with pytest.raises(ValueError, match="size=0: expected at least 1"):
        card.build(size=0)


@pytest.mark.parametrize(("wrong", "right"), [("bigbrd", "bigbird"), ("sinkwindow", "sink_window"), ("Moba", "moba")])
def test_unknown_names_are_answered_with_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"unknown mechanism '{wrong}'; did you mean .*'{right}'"):
        get(wrong)


def test_a_name_like_no_other_gets_no_suggestion():
    with pytest.raises(ValueError, match=f"^unknown mechanism 'qqqqqqqq' `saccade list` shows all {len(cards())}$"):
        get("qqqqqqqq")


def test_cards_come_by_room_and_name():
    found = cards()
    assert len(found) == len({card.name for card in found})
    assert list(found) == sorted(found, key=lambda card: (catalog.ROOMS.index(card.room), card.name))
    assert all(get(card.name) is card for card in found)


@pytest.mark.parametrize(
    ("conditions", "holds"),
    [
        ({"room": "where"}, lambda card: card.room == "where"),
        ({"pattern": Pattern.CAUSAL_SELF}, lambda card: Pattern.CAUSAL_SELF in card.patterns),
        ({"pattern": "noncausal-cross"}, lambda card: Pattern.NONCAUSAL_CROSS in card.patterns),
        ({"training_free": True}, lambda card: card.training_free),
        ({"training_free": False}, lambda card: not card.training_free),
        ({"capability": "streaming"}, lambda card: "streaming" in card.supports),
        ({"kind": "selector"}, lambda card: card.kind is Kind.SELECTOR),
        ({"title": "bIg bIrD"}, lambda card: card.name == "bigbird"),
        ({"title": "streaming language models"}, lambda card: "Efficient Streaming" in "".join(card.other_papers)),
        (
            {"room": "where", "capability": "segments", "training_free": True},
            lambda card: card.room == "where" and "segments" in card.supports and card.training_free,
        ),
        ({}, lambda card: True),
    ],
)
def test_search_keeps_the_cards_that_meet_every_condition(conditions, holds):
    found = search(**conditions)
    assert list(found) == [card for card in cards() if holds(card)]
    assert found or "pattern" in conditions


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"room": "kitchen"}, r"room='kitchen': expected one of \('where', "),
        ({"capability": "flying"}, r"capability='flying': expected one of \['backward', "),
        ({"pattern": "sideways"}, "pattern='sideways': expected one of .*'causal-self'"),
        ({"kind": "engine"}, "kind='engine': expected one of .*'selector'"),
    ],
)
def test_search_refuses(conditions, message):
    with pytest.raises(ValueError, match=message):
        search(**conditions)


@pytest.mark.parametrize("card", cards(), ids=lambda card: card.name)
def test_every_card_is_complete(card):
    assert card.summary.endswith(".")
    assert card.year >= 1990
    assert re.fullmatch(r"([\w.-]+/[\w.-]+)?", card.code)
    assert card.target.__doc__
    assert isinstance(card.build(), card.target)
    for length in (64, 256, 8192):
        settings = [] if card.ladder is None else list(card.ladder(length))
        settings += [] if card.exact is None else [card.exact(length)]
        assert all(isinstance(card.build(**setting), card.target) for setting in settings)
