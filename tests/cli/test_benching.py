"""`saccade bench` prints each case once it is done, so that a run that is cut off has shown what it had."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

from saccade.bench.case import Case, Work
from saccade.bench.ops import COLUMNS, run_case
from saccade.cli.app import app
from saccade.cli.benching import Printed

runner = CliRunner()


def refused(reason: str):
    def prepare() -> Work:
        raise ValueError(reason)

    return prepare


@pytest.fixture
def outcomes():
    """Two that say why they did not run: all that printing needs."""
    return [run_case(Case(name, refused(f"no engine for {name}")), 1, lambda: 1.0) for name in ("first", "second")]


@pytest.fixture
def interrupted(monkeypatch):
    """Three cases, of which the last is interrupted."""

    def stop() -> Work:
        raise KeyboardInterrupt

    known = [Case("first", refused("no engine")), Case("second", refused("no engine")), Case("third", stop)]
    monkeypatch.setattr("saccade.bench.ops.cases", lambda quick: known)  # noqa: ARG005


def test_json_is_written_case_by_case(outcomes, capsys):
    text = ""
    with Printed(COLUMNS, {"cores": 2}, as_json=True, markdown=None) as printed:
        for number, outcome in enumerate(outcomes, 1):
            printed.add(outcome)
            text += capsys.readouterr().out
            cut_off = json.loads(text + "]}")
            assert [case["name"] for case in cut_off["cases"]] == ["first", "second"][:number]
    whole = json.loads(text + capsys.readouterr().out)
    assert whole == {"machine": {"cores": 2}, "cases": [json.loads(json.dumps(x.to_json())) for x in outcomes]}


def test_rows_are_written_case_by_case(outcomes, capsys, tmp_path):
    path = tmp_path / "table.md"
    with Printed(COLUMNS, {"cores": 2}, as_json=False, markdown=path) as printed:
        printed.add(outcomes[0])
        head, row = capsys.readouterr().out.splitlines()
        assert all(name in head for name in COLUMNS)
        assert "no engine for first" in row
        assert path.read_text().splitlines()[2].startswith("| first | ")
        printed.add(outcomes[1])
        (row,) = capsys.readouterr().out.splitlines()
        assert "no engine for" in row
        assert len(path.read_text().splitlines()) == 4
    assert capsys.readouterr().out.split() == ["cores", "2"]


def test_what_is_long_takes_several_lines(outcomes, capsys):
    with Printed(("what",), {}, as_json=False, markdown=None) as printed:
        printed._show([("word " * 30,)])  # noqa: SLF001
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) > 3
        assert max(map(len, lines)) <= 42


def test_an_interrupted_run_leaves_whole_json(interrupted):
    result = runner.invoke(app, ["bench", "ops", "--json"])
    assert result.exit_code != 0
    assert [case["name"] for case in json.loads(result.stdout)["cases"]] == ["first", "second"]
    assert result.stderr.splitlines()[:3] == ["1 of 3: first", "2 of 3: second", "3 of 3: third"]


def test_an_interrupted_run_leaves_a_table(interrupted, tmp_path):
    path = tmp_path / "table.md"
    result = runner.invoke(app, ["bench", "ops", "--markdown", str(path)])
    assert result.exit_code != 0
    assert re.search(r"first +skipped: no engine", " ".join(result.stdout.split()))
    assert len(path.read_text().splitlines()) == 4


def test_bad_input_prints_nothing_and_keeps_an_old_file(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("old")
    result = runner.invoke(app, ["bench", "ops", "--only", "(", "--json", "--markdown", str(path)])
    assert "only='(': not a regular expression" in str(result.exception)
    assert result.stdout == ""
    assert path.read_text() == "old"
