import copy
import errno
import json
import re
import sys
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from saccade.report import page, render, write_report

VOID = {"meta", "img", "br", "link"}
EVIL = "<script>alert(1)</script>"


class Parsed(HTMLParser):
    """Tags with their attributes; fails where an element is left open or closed twice."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def parsed(report):
    return Parsed(render(report))


def test_page_needs_nothing_else(report, parsed):
    assert parsed.all("script") == parsed.all("link") == parsed.all("iframe") == []
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in parsed.all("img"))
    assert {attrs["href"] for attrs in parsed.all("a") if not attrs["href"].startswith("#")} == {"report.json"}
    outside = re.findall(r"https?://[^\"' ]+", render(report))
    assert set(outside) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert any("default-src 'none'" in attrs.get("content", "") for attrs in parsed.all("meta"))


def test_page_is_valid_where_it_matters(parsed):
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = [attrs["xlink:href"] for attrs in parsed.all("use")] + [attrs["href"] for attrs in parsed.all("a")]
    used += [attrs["aria-labelledby"] for _, attrs in parsed.tags if "aria-labelledby" in attrs]
    assert {name.removeprefix("#") for name in used if name != "report.json"} <= set(ids)


def test_page_is_accessible(parsed):
    assert parsed.all("html") == [{"lang": "en"}]
    assert [tag for tag, _ in parsed.tags if tag == "h1"] == ["h1"]
    assert all(attrs.get("scope") in {"col", "row", "colgroup"} for attrs in parsed.all("th"))
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in parsed.all("svg"))
    assert len(parsed.all("svg")) == 4
    assert all(attrs.get("alt") for attrs in parsed.all("img"))
    scrolling = [attrs for attrs in parsed.all("div") if attrs.get("class") == "scroll"]
    assert all(attrs["tabindex"] == "0" and attrs["role"] == "region" for attrs in scrolling)
    assert all("aria-label" in attrs or "aria-labelledby" in attrs for attrs in scrolling)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out(theme):
    style = files("saccade.report").joinpath("report.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for name in ("ink", "soft", "good", "bad", "link"):
        assert min(contrast(colours[name], colours[ground]) for ground in ("paper", "card")) >= 4.5, name
    for number in range(12):
        assert contrast(colours[f"series-{number}"], colours["paper"]) >= 3, number


def test_page_is_deterministic_and_small(report):
    text = render(report)
    assert text == render(copy.deepcopy(report))
    assert len(text.encode()) < 1_500_000


def test_page_from_json_is_the_page(report):
    assert render(json.loads(json.dumps(report))) == render(report)


def test_render_leaves_the_report_alone(report):
    before = copy.deepcopy(report)
    render(report)
    assert report == before


def test_everything_is_escaped(report):
    places = [
        (report["model"], "name"), (report, "command"), (report, "text"), (report["heldout"], "notes"),
        (report["heldout"]["table"][0], "name"), (report["targets"][0], "got"), (report["targets"][1], "name"),
        (report["candidates"][0], "label"), (report["candidates"][0], "mechanism"), (report["examples"][0], "label"),
        (report["layers"][0]["choices"][0], "label"), (report["machine"], EVIL), (report["left_out"], EVIL),
        (report["search"]["confirmed"][0], "passkey"),
    ]  # fmt: skip
    for number, (part, key) in enumerate(places):
        part[key] = f"{EVIL}{number}'\"&"
    text = render(report)
    assert "<script" not in text
    Parsed(text)
    for number in range(len(places)):
        assert f"&lt;script&gt;alert(1)&lt;/script&gt;{number}&#" in text, places[number][1]


def test_missed_targets_are_said_first(report):
    text = render(report)
    assert "1 of 3 targets missed." in text
    assert text.index("targets missed") < text.index("<h2")
    assert "Perplexity, against dense: +1.24\u00a0%, wanted at most 1.00\u00a0% more." in text
    assert text.count("✗ missed") == 1


def test_reached_targets(report):
    for target in report["targets"]:
        target["met"] = True
    assert "All 3 targets reached." in render(report)


def test_slower_is_called_slower(report):
    report["summary"]["prefill_speedup"] = 0.91
    assert "0.91× as fast as dense attention, that is slower" in render(report)


def test_dense_everywhere(dense_report):
    text = render(dense_report)
    assert "keeps dense attention in every head: no mixture of the candidates is predicted to be faster" in text
    assert "270 of 270 heads stay dense" in text
    assert "None: no mixture was predicted" in text
    assert 'id="examples"' not in text
    assert Parsed(text).all("img") == []


def test_heads_computed_in_another_dtype_are_said(dense_report):
    dense_report["model"]["dtype"] = "float32"
    assert "rounded to" not in render(dense_report)
    for layer in dense_report["layers"][:2]:
        layer["choices"][0] |= {"label": "dense(engine=saccade) in bfloat16", "dtype": "bfloat16"}
    text = render(dense_report)
    assert "In 18 heads the queries, keys and values of a prompt are rounded to bfloat16; the model’s own are" in text
    assert "keeps dense attention in every head" not in text


def test_lost_pass_key_is_marked(report):
    assert render(report).count('aria-label="lost"') == 1


def test_unknown_numbers_are_dashes(report):
    report["candidates"][0] |= {"damage": float("nan"), "error": float("nan")}
    report["search"]["confirmed"][0]["rise"] = float("inf")
    text = render(report)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).replace("nano", "")
    assert "<td>–</td>" in text


@pytest.mark.parametrize(("shown", "wanted"), [
    (page.seconds(None), "–"), (page.seconds(1.234), "1.23 s"), (page.seconds(0.0456), "45.6 ms"),
    (page.megabytes(None), "–"), (page.megabytes(1234567890), "1,234.6 MB"),
    (page.percent(None), "–"), (page.percent(0.01234), "1.23 %"), (page.percent(0.5, 0), "50 %"),
    (page.signed(None), "–"), (page.signed(0.0062), "+0.62 %"), (page.signed(-1e-9), "+0.00 %"),
    (page.number(None), "–"), (page.number(0.00123456), "0.00123"), (page.thousands(8192), "8,192"),
    (page.tight("1 % more"), "1\u00a0% more"),
])  # fmt: skip
def test_forms(shown, wanted):
    assert shown == wanted


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_missing_package(report, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"the report needs {name}: pip install 'saccade\[report\]'"):
        render(report)


def test_write_report(report, tmp_path):
    report["candidates"][0]["error"] = float("nan")
    folder = tmp_path / "new" / "folder"
    json_path, html_path = write_report(report, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert json.loads(json_path.read_text(encoding="utf-8"))["candidates"][0]["error"] is None
    assert html_path.read_text(encoding="utf-8") == render(report)


def full_disk(monkeypatch, method, at):
    """Let the call number `at` of a method of `Path` fail as on a full disk; a failing write leaves a torso."""
    real, calls = getattr(Path, method), []

    def fail(self, *args, **kwargs):
        calls.append(self)
        if len(calls) - 1 == at:
            if method == "write_text":
                real(self, args[0][:10], **kwargs)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, method, fail)


@pytest.mark.parametrize(("method", "at", "name"), [
    ("write_text", 0, "report.json"), ("write_text", 1, "report.html"), ("replace", 0, "report.json"),
])  # fmt: skip
def test_full_disk_changes_nothing(report, tmp_path, monkeypatch, method, at, name):
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full_disk(monkeypatch, method, at)
    with pytest.raises(RuntimeError, match=rf"{name}: cannot be written: No space left on device; nothing was changed"):
        write_report(report | {"command": "another"}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_failure_at_the_very_last_step_says_what_is_new(report, tmp_path, monkeypatch):
    _, html_path = write_report(report, tmp_path)
    before = html_path.read_bytes()
    full_disk(monkeypatch, "replace", 1)
    with pytest.raises(RuntimeError, match=r"report\.html: cannot be written: .*; only report\.json is new"):
        write_report(report | {"command": "another"}, tmp_path)
    assert html_path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_folder_that_is_a_file(report, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(RuntimeError, match="file: cannot be written: .*; nothing was changed"):
        write_report(report, tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_broken_report_writes_nothing(report, tmp_path):
    del report["summary"]
    with pytest.raises(Exception, match="summary"):
        write_report(report, tmp_path)
    assert list(tmp_path.iterdir()) == []
