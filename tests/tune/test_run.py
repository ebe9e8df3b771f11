"""A whole tuning run on a tiny model: files, resuming, and errors before any work."""

from __future__ import annotations

import json
import math
import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from saccade.kernels import cpu
from saccade.plug import Recipe, apply
from saccade.plug.cache_recipe import in_words
from saccade.tune import Progress, plan_tuning, tune
from saccade.tune.candidates import fast_dtype
from saccade.tune.heldout import DECODE_TOKENS

OPTIONS = {"context": 2048, "quick": True, "mechanisms": ["sink_window", "sparge"], "budget": 0.5}


class Notes(Progress):
    """Keeps what it is told, and can stop a run."""

    def __init__(self, stop_at=None):
        self.stages, self.notes, self.stop_at = [], [], stop_at

    def begin(self, title, steps):
        self.stages.append(title)

    def step(self, note=""):
        self.notes.append(note)
        if self.stop_at is not None and self.stop_at in note:
            raise KeyboardInterrupt

    def say(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def finished(byte_model, tmp_path_factory):
    model, tokenizer = byte_model
    folder = tmp_path_factory.mktemp("tune")
    notes = Notes()
    return tune(model, tokenizer, folder, progress=notes, name="tiny <b>", command="saccade tune", **OPTIONS), notes


def test_the_files_are_there_and_agree(finished):
    result, _ = finished
    assert Recipe.load(result.folder / "recipe.json") == result.recipe
    assert not (result.folder / "state.json").exists()
    assert json.loads((result.folder / "report.json").read_text()) == json.loads(json.dumps(result.report))
    page = (result.folder / "report.html").read_text()
    assert "tiny &lt;b&gt;" in page
    assert "<script" not in page
    assert re.search(r'(?:src|href)="http', page) is None


def test_every_stage_is_told(finished):
    _, notes = finished
    assert notes.stages == [
        "score candidates per layer", "search and confirm", "measure on held-out text", "pass keys",
        "pictures and report",
    ]  # fmt: skip


def test_the_report_holds_what_was_measured(finished):
    report = finished[0].report
    assert len(report["layers"]) == 2
    assert all(sum(len(c["heads"]) for c in layer["choices"]) == 4 for layer in report["layers"])
    assert {row["mechanism"] for row in report["candidates"]} - {"dense"} == {"sink_window", "sparge"}
    assert report["summary"]["perplexity"]["dense"] > 1
    assert report["summary"]["passkeys_asked"] == 2
    assert [row["tokens"] for row in report["heldout"]["passkey"]] == [512, 1024]
    assert [target["name"] for target in report["targets"]] == [
        "prefill, against dense", "perplexity, against dense", "pass keys found",
        *(["time of a decoded token, against dense"] if finished[0].recipe.has_cache else []),
    ]  # fmt: skip
    assert set(report["left_out"].values()) == {"not asked for"}


def test_the_recipe_names_the_cache_it_was_measured_with(finished):
    result = finished[0]
    report, kernel = result.report, cpu.missing() is None
    assert result.recipe.has_cache is kernel
    assert report["summary"]["cache"] == {
        "dense": "DynamicCache", "tuned": "PagedCache: everything" if kernel else "DynamicCache",
    }  # fmt: skip
    assert f"tuned from {report['summary']['cache']['tuned']}" in report["heldout"]["notes"]
    # fp32 keys and values of 2 layers and 2 heads of 8: pages of 64 tokens with their positions hold a little more
    dense = 2 * 2 * 2 * 8 * 4 * (OPTIONS["context"] + DECODE_TOKENS)
    assert report["summary"]["kv_bytes"]["dense"] == dense
    assert dense < report["summary"]["kv_bytes"]["tuned"] < 1.15 * dense or not kernel


def test_without_a_kernel_the_recipe_has_no_cache_and_the_report_says_so(byte_model, tmp_path, monkeypatch):
    model, tokenizer = byte_model
    monkeypatch.setattr("saccade.tune.run.exact_cache", lambda *_: (None, "decoding from pages has no kernel here"))
    result = tune(model, tokenizer, tmp_path, **(OPTIONS | {"mechanisms": ["sink_window"]}))
    assert not result.recipe.has_cache
    assert result.report["summary"]["cache"]["tuned"] == "DynamicCache"
    assert "no kernel here" in (tmp_path / "report.html").read_text()


def test_caches_that_hold_less_are_searched_and_measured(byte_model, tmp_path, monkeypatch):
    model, tokenizer = byte_model
    monkeypatch.setattr("saccade.tune.cache_search.SLOWER", math.inf)  # a tiny model's steps are all overhead
    notes = Notes()
    options = OPTIONS | {"mechanisms": ["sink_window"], "cache_budget": 0.4}
    result = tune(model, tokenizer, tmp_path, progress=notes, **options)
    report, summary = result.report, result.report["summary"]
    assert "search caches" in notes.stages
    assert Recipe.load(tmp_path / "recipe.json") == result.recipe
    (kept,) = [trial for trial in report["search"]["caches"] if trial["kept"]]
    assert kept["share"] <= 0.4
    assert kept["rise"] <= 0.5
    assert summary["cache"]["tuned"] != "PagedCache: everything"
    assert [layer["cache"] for layer in report["layers"]] == [
        in_words(layer.cache.build()) for layer in result.recipe.layers.values()
    ]
    cut = summary["after_the_cut"]
    assert cut["tokens"] == 256
    assert cut["kv_bytes"]["tuned"] < 0.6 * cut["kv_bytes"]["dense"]
    assert cut["perplexity_rise"] == pytest.approx(cut["perplexity"]["tuned"] / cut["perplexity"]["dense"] - 1)
    rows = {row["name"]: row for row in report["heldout"]["table"]}
    assert float(rows["key/value cache"]["ratio"]) == pytest.approx(
        summary["kv_bytes"]["tuned"] / summary["kv_bytes"]["dense"], abs=1e-3
    )
    assert "perplexity of the last 256 tokens, cache cut before" in rows
    assert [target["name"] for target in report["targets"]][-3:] == [
        "bytes of keys and values, against dense", "perplexity after the cache was cut",
        "pass keys asked after the cache was cut",
    ]  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "Caches measured end to end" in page
    assert kept["caches"] in page
    assert "quest" in report["left_out"]


def test_where_no_cache_holds_the_recipe_keeps_everything(byte_model, tmp_path, monkeypatch):
    model, tokenizer = byte_model
    monkeypatch.setattr("saccade.tune.cache_search.MARGIN", -1e6)
    options = OPTIONS | {"mechanisms": ["sink_window"], "cache_budget": 0.4}
    result = tune(model, tokenizer, tmp_path, **options)
    assert {layer["cache"] for layer in result.report["layers"]} <= {"everything", None}
    assert result.report["summary"]["after_the_cut"] is None
    (row,) = [target for target in result.report["targets"] if target["name"].startswith("bytes of keys")]
    assert not row["met"]


def test_a_killed_run_continues(byte_model, tmp_path):
    model, tokenizer = byte_model
    with pytest.raises(KeyboardInterrupt):
        tune(model, tokenizer, tmp_path, progress=Notes(stop_at="layers.0"), **OPTIONS)
    assert (tmp_path / "state.json").exists()
    assert not (tmp_path / "recipe.json").exists()
    notes = Notes()
    result = tune(model, tokenizer, tmp_path, progress=notes, **OPTIONS)
    assert f"continuing the run in {tmp_path}" in notes.notes
    assert not any("layers.0" in note for note in notes.notes)
    assert any("layers.1" in note for note in notes.notes)
    assert len(result.report["layers"]) == 2


def test_the_recipe_can_be_applied_and_undone(byte_model, finished):
    model, tokenizer = byte_model
    ids = tokenizer("The quick brown fox. " * 4, return_tensors="pt").input_ids
    before = model(ids).logits
    with apply(model, finished[0].recipe):
        model(ids)
    assert model(ids).logits.equal(before)


def test_a_plan_lists_without_running(byte_model):
    plan = plan_tuning(byte_model[0], **OPTIONS)
    assert {c.mechanism for c in plan.candidates} - {"dense"} == {"sink_window", "sparge"}
    assert all(c.dtype == fast_dtype(byte_model[0]) for c in plan.candidates)
    kept = plan_tuning(byte_model[0], **OPTIONS, keep_dtype=True)
    assert {(c.mechanism, c.dtype) for c in kept.candidates} == {("sink_window", None), ("sparge", None)}
    assert plan.total_minutes > 0
    assert set(plan.minutes) == {
        "score candidates per layer", "search and confirm", "measure on held-out text", "pass keys",
        "pictures and report",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 100}, "context=100: expected at least 256 tokens"),
        ({"context": 8192}, "context=8192: expected at most the model's 4096 positions"),
        ({"budget": 0.0}, "budget=0.0: expected a relative rise"),
        ({"budget": 2.0}, "budget=2.0: expected a relative rise"),
        ({"cache_budget": 0.0}, "cache_budget=0.0: expected a part of the dense cache's bytes in (0, 1), or None"),
        ({"cache_budget": 1.0}, "cache_budget=1.0: expected a part of the dense cache's bytes in (0, 1), or None"),
        ({"mechanisms": ["mobba"]}, "unknown mechanism 'mobba'; did you mean 'moba'"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(byte_model, tmp_path, changes, words):
    model, tokenizer = byte_model
    with pytest.raises(ValueError, match=re.escape(words)):
        tune(model, tokenizer, tmp_path, **(OPTIONS | changes))
    assert list(tmp_path.iterdir()) == []


def test_short_and_missing_texts_are_refused(byte_model, tmp_path):
    model, tokenizer = byte_model
    text = tmp_path / "short.txt"
    text.write_text("one two three. " * 20)
    with pytest.raises(ValueError, match=r"its calibration part has \d+ tokens, expected at least 2048"):
        tune(model, tokenizer, tmp_path / "out", text=text, **OPTIONS)
    with pytest.raises(ValueError, match=r"text='.*none.txt': cannot be read"):
        tune(model, tokenizer, tmp_path / "out", text=tmp_path / "none.txt", **OPTIONS)
