"""`saccade.models.text`."""

from __future__ import annotations

from pathlib import Path

import pytest

from saccade.models import text
from saccade.models.text import builtin_text, calibration_text, heldout_text, read_text, split_text

pytestmark = pytest.mark.quick


def long_paragraphs(value: str) -> list[str]:
    return [paragraph for paragraph in value.split("\n\n") if len(paragraph) >= text.SHORT]


def test_builtin_text_is_long_clean_and_the_same_each_time() -> None:
    value = builtin_text()
    # English text takes between 3 and 5 characters a token.
    assert len(value) > 400_000
    assert "\n\n\n" not in value
    assert "\n****" not in value
    assert value.startswith('The "assert" statement')
    builtin_text.cache_clear()
    text._topics.cache_clear()
    assert builtin_text() == value


def test_heldout_text_shares_no_paragraph_with_calibration_text() -> None:
    calibration, heldout = long_paragraphs(calibration_text()), long_paragraphs(heldout_text())
    assert not set(calibration) & set(heldout)
    everything = long_paragraphs(builtin_text())
    assert set(calibration) | set(heldout) == set(everything)
    share = len(heldout_text()) / len(heldout_text() + calibration_text())
    assert 0.3 < share < 0.5


def test_split_text_cuts_between_paragraphs() -> None:
    assert split_text("a a a a a\n\nb b b\n\nc c") == ("a a a a a", "b b b\n\nc c")
    assert split_text("one\ntwo", 0.5) == ("one", "two")
    with pytest.raises(ValueError, match=r"heldout=1: expected a fraction between 0 and 1"):
        split_text("a b", 1)
    with pytest.raises(ValueError, match="text of 3 characters: expected at least two words"):
        split_text("abc")


def test_read_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffhé\r\nyou\n".encode())
    assert read_text(path) == "hé\nyou\n"
    with pytest.raises(ValueError, match=r"none.txt': cannot be read: No such file"):
        read_text(tmp_path / "none.txt")
    path.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="a.txt': byte 2 is not UTF-8"):
        read_text(path)
    path.write_bytes(b" \n")
    with pytest.raises(ValueError, match="is empty, expected plain text"):
        read_text(path)
    path.write_bytes(b"a\0b")
    with pytest.raises(ValueError, match="holds NUL bytes"):
        read_text(path)
    monkeypatch.setattr(text, "MAX_BYTES", 2)
    with pytest.raises(ValueError, match="a.txt': more than 0 MiB, expected a smaller file"):
        read_text(path)
