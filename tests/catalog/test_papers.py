"""The paper catalogue."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import pytest

from saccade.catalog import ROOMS, Paper, cards, papers
from saccade.catalog.papers import paper_titles

pytestmark = pytest.mark.quick


def test_380_rows_with_unique_titles():
    assert len(papers()) == 380
    assert len(paper_titles()) == 380


def test_scopes_are_counted_as_the_design_says():
    assert Counter(paper.scope for paper in papers()) == {"mechanism": 232, "system": 103, "context": 45}


def test_every_field_is_text_and_the_needed_ones_are_filled():
    for paper in papers():
        assert all(isinstance(getattr(paper, field.name), str) for field in fields(Paper))
        assert paper.title.strip() == paper.title != ""
        assert paper.what
        assert paper.name or paper.scope != "mechanism", paper.title


def test_mechanisms_live_in_rooms_that_exist():
    rooms = {paper.room for paper in papers() if paper.scope == "mechanism"}
    elsewhere = {"ops", "bench"}  # an engine, a benchmark
    assert rooms - elsewhere <= set(ROOMS), rooms - set(ROOMS)


def test_rows_are_read_once_and_cannot_change():
    assert papers() is papers()
    with pytest.raises(AttributeError, match="cannot assign to field 'title'"):
        papers()[0].title = "other"


def test_cards_name_papers_that_are_there():
    assert {title for card in cards() for title in card.papers} <= paper_titles()
