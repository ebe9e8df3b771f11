"""`saccade list`, `show` and `verify`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from saccade import cli
from saccade.catalog import cards, get, papers
from saccade.cli import catalogue
from saccade.laws import LAWS, Verdict


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    catalogue.add_commands(app)
    return app


def run(app: typer.Typer, *arguments: str):
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue.console, "width", 160)


def test_list_shows_every_mechanism(app: typer.Typer) -> None:
    result = run(app, "list")
    assert result.exit_code == 0
    assert len(cards()) >= 28
    assert [card.name for card in cards() if card.name not in result.stdout] == []
    assert f"{len(cards())} mechanisms; " in result.stdout
    assert f"of {len(papers())} papers implemented" in result.stdout


def test_list_json_names_every_mechanism_and_every_paper(app: typer.Typer) -> None:
    result = run(app, "list", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [entry["name"] for entry in found["mechanisms"]] == [card.name for card in cards()]
    assert len(found["mechanisms"]) >= 28
    assert len(found["papers"]) == len(papers()) == 380
    assert {paper["status"] for paper in found["papers"]} <= {"implemented", "not yet", "nothing to build"}
    assert [paper["title"] for paper in found["papers"] if not paper["detail"]] == []
    moba = next(entry for entry in found["mechanisms"] if entry["name"] == "moba")
    assert moba["patterns"] == ["causal-self"]
    assert moba["example"] == dict(get("moba").example)


def test_list_papers_counts_what_is_implemented(app: typer.Typer) -> None:
    found = json.loads(run(app, "list", "--json").stdout)["papers"]
    implemented = [paper for paper in found if paper["status"] == "implemented"]
    assert {title for card in cards() for title in card.papers} == {paper["title"] for paper in implemented}
    assert "moba" in next(paper["detail"] for paper in implemented if paper["title"].startswith("MoBA"))
    result = run(app, "list", "--papers", "--title", "MoBA: Mixture of Block Attention")
    assert result.exit_code == 0
    assert "implemented" in result.stdout


def test_every_row_of_where_is_implemented_or_says_what_is_missing(app: typer.Typer) -> None:
    found = json.loads(run(app, "list", "--room", "where", "--json").stdout)["papers"]
    assert len(found) == 50
    assert [row["title"] for row in found if row["status"] != "implemented" and not row["missing"]] == []
    combiner = next(row for row in found if row["title"].startswith("Combiner"))
    assert "axial forms" in combiner["missing"]
    assert "axial forms" in " ".join(run(app, "list", "--papers", "--title", "Combiner").stdout.split())


def test_list_filters(app: typer.Typer) -> None:
    found = json.loads(run(app, "list", "--room", "cache", "--json").stdout)
    assert {entry["room"] for entry in found["mechanisms"]} == {"cache"}
    assert {paper["room"] for paper in found["papers"]} == {"cache"}
    found = json.loads(run(app, "list", "--trained", "--capability", "streaming", "--json").stdout)
    assert found["mechanisms"]
    assert not any(entry["training_free"] for entry in found["mechanisms"])
    found = json.loads(run(app, "list", "--pattern", "noncausal-cross", "--json").stdout)
    assert all("noncausal-cross" in entry["patterns"] for entry in found["mechanisms"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("list", "--room", "kitchen"), "room='kitchen': expected one of"),
        (("list", "--capability", "speed"), "capability='speed': expected one of"),
        (("list", "--pattern", "diagonal"), "pattern='diagonal': expected one of"),
        (("show", "softplu"), "unknown mechanism 'softplu'; did you mean 'softplus'"),
        (("verify", "sink_windo"), "unknown mechanism 'sink_windo'; did you mean 'sink_window'"),
        (("verify",), r"names=\[\]: expected names, or --all without names, or"),
        (("verify", "--room", "wher"), r"room='wher': expected one of \('where',"),
        (("verify", "--all", "cog"), r"names=\['cog'\]: expected names, or --all without names"),
        (("verify", "cog", "--law", "16"), r"laws=\[16\]: expected numbers from 1 to 15"),
        (("show", "moba", "--tokens", "0"), "tokens=0: expected at least 1"),
        (("show", "cog", "--no-laws", "--picture", "x.png"), "picture='x.png': cog has no pattern to draw"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(
    app: typer.Typer, arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    result = run(app, *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)
    with pytest.raises(ValueError, match=words):
        raise result.exception
    monkeypatch.setattr(sys, "argv", ["saccade", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("saccade: ")
    assert printed.count("\n") == 1


def test_show_prints_the_card_and_the_pattern(app: typer.Typer, tmp_path: Path) -> None:
    picture = tmp_path / "moba.png"
    pytest.importorskip("matplotlib")
    result = run(app, "show", "moba", "--no-laws", "--tokens", "128", "--picture", str(picture))
    assert result.exit_code == 0, result.output
    for words in (
        "MoBA: Mixture of Block Attention",
        "exact when",
        "topk >= N / chunk",
        "deviation",
        "128 tokens",
        "█",
    ):
        assert words in result.stdout
    assert "█" in result.stdout
    assert picture.stat().st_size > 1000


def test_show_draws_token_lists_too_and_nothing_for_other_kinds(app: typer.Typer) -> None:
    assert "rows are queries" in run(app, "show", "hip", "--no-laws", "--tokens", "64").stdout
    result = run(app, "show", "entropy", "--no-laws")
    assert result.exit_code == 0
    assert "rows are queries" not in result.stdout


def test_show_runs_the_laws_unless_told_not_to(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(catalogue, "verify", lambda name: asked.append(name) or [Verdict(1, "one", "passed")])
    assert "1 one" in run(app, "show", "cog").stdout
    assert run(app, "show", "cog", "--no-laws").exit_code == 0
    assert asked == ["cog"]


def test_verify_prints_a_verdict_for_each_law(app: typer.Typer) -> None:
    result = run(app, "verify", "pab")
    assert result.exit_code == 0
    for law in LAWS:
        assert law.title in result.stdout
    assert "0 failed" in result.stdout


def test_verify_json(app: typer.Typer) -> None:
    result = run(app, "verify", "cog", "pab", "--law", "10", "--law", "12", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert list(found["mechanisms"]) == ["cog", "pab"]
    assert [verdict["law"] for verdict in found["mechanisms"]["cog"]] == [10, 12]
    assert found["counts"] == {"passed": 4, "failed": 0, "skipped": 0}


def test_verify_fails_with_code_1(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        catalogue, "verify", lambda *asked: [Verdict(4, "causality", "failed", "q of shape [batch, heads] is off")]
    )
    result = run(app, "verify", "cog")
    assert result.exit_code == 1
    assert "q of shape [batch, heads] is off" in result.stdout
    assert "1 failed" in result.stdout
    assert json.loads(run(app, "verify", "cog", "--json").stdout)["counts"]["failed"] == 1


def test_verify_all_takes_every_mechanism(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "verify", lambda name, *rest: [Verdict(1, "one", "skipped", "a reason")])
    found = json.loads(run(app, "verify", "--all", "--json").stdout)
    assert list(found["mechanisms"]) == [card.name for card in cards()]


def test_verify_takes_a_room(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "verify", lambda name, *rest: [Verdict(1, "one", "skipped", "a reason")])
    found = json.loads(run(app, "verify", "--room", "probe", "--json").stdout)
    assert list(found["mechanisms"]) == [card.name for card in cards() if card.room == "probe"]
