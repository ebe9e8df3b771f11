"""Every law on every registered mechanism; `saccade verify` runs the same."""

from __future__ import annotations

import pytest

from saccade.catalog import Card, cards
from saccade.laws import LAWS, Law
from saccade.laws.subjects import form_of
from saccade.laws.suite import FORMS, run_law, verify

QUICK_LAWS = (1, 4, 10)


def quick_names() -> set[str]:
    """The first mechanism of each of the first four rooms."""
    first: dict[str, str] = {}
    for card in cards():
        first.setdefault(card.room, card.name)
    return set(list(first.values())[:4])


def cases() -> list:
    quick = quick_names()
    return [
        pytest.param(
            law, card, id=f"{card.name}-{law.number}",
            marks=[pytest.mark.quick] if card.name in quick and law.number in QUICK_LAWS else [],
        )
        for card in cards()
        for law in LAWS
    ]  # fmt: skip


@pytest.mark.parametrize(("law", "card"), cases())
def test_law(law: Law, card: Card) -> None:
    verdict = run_law(law, card)
    if verdict.status == "skipped":
        assert verdict.detail
        pytest.skip(verdict.detail)
    assert verdict.status == "passed", verdict.detail


def test_the_quick_slice_is_not_empty() -> None:
    assert len(quick_names()) == 4


@pytest.mark.parametrize("form", FORMS)
def test_every_form_answers_for_every_law(form: str) -> None:
    checks, reasons = set(FORMS[form].checks), set(FORMS[form].reasons)
    assert checks | reasons == {law.number for law in LAWS}
    assert not checks & reasons


def test_every_registered_mechanism_has_a_form() -> None:
    assert {form_of(card) for card in cards()} <= set(FORMS)


def test_laws_are_numbered_in_order() -> None:
    assert [law.number for law in LAWS] == list(range(1, 16))


def test_verify_selects_laws_and_refuses_unknown_ones() -> None:
    assert [verdict.law for verdict in verify("cog", laws=[12, 2])] == [2, 12]
    with pytest.raises(ValueError, match=r"laws=\[0, 16\]: expected numbers from 1 to 15"):
        verify("cog", laws=[0, 3, 16])
    with pytest.raises(ValueError, match="unknown mechanism 'softplu'; did you mean 'softplus'"):
        verify("softplu")
