"""`saccade tune`, `run`, `compare`, `bench` from the command line."""

from __future__ import annotations

import json
from functools import partial

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from saccade.bench.recall import recall
from saccade.cli.app import app
from saccade.plug import LayerCache, PolicyChoice, Recipe

runner = CliRunner()


@pytest.fixture
def saved(byte_model, tmp_path):
    """The tiny model as a folder that transformers can load."""
    model, tokenizer = byte_model
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_dry_run_lists_and_stops(saved, tmp_path):
    out = tmp_path / "out"
    result = runner.invoke(app, ["tune", str(saved), "--context", "1024", "--dry-run", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "score candidates per layer" in result.output
    assert "sink_window(" in result.output
    assert not out.exists()


def test_dry_run_lists_caches_where_fewer_bytes_are_wanted(saved, tmp_path):
    arguments = ["tune", str(saved), "--context", "1024", "--dry-run", "--out", str(tmp_path / "out")]
    result = runner.invoke(app, [*arguments, "--cache-budget", "0.5"])
    assert result.exit_code == 0, result.output
    assert "search caches" in result.output
    assert "cache: keep snapkv(tokens=512, window=32" in result.output
    assert "cache: store bits=8" in result.output
    assert "quest: selecting: holds as many bytes as dense attention does" in result.output
    assert "  cache: " not in runner.invoke(app, arguments).output


def test_run_generates_with_a_recipe(saved, byte_model, tmp_path):
    recipe = tmp_path / "recipe.json"
    Recipe.uniform(byte_model[0], "sink_window", {"window": 8, "sinks": 2}, decode=False).save(recipe)
    arguments = [
        "run",
        str(saved),
        "--prompt",
        "Once upon a time",
        "--tokens",
        "4",
        "--recipe",
        str(recipe),
        "--explain",
    ]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "tokens/s with the recipe" in result.output
    assert "sink_window(window=8, sinks=2)" in result.output


def test_run_uses_the_cache_of_a_recipe(saved, byte_model, tmp_path):
    recipe = tmp_path / "recipe.json"
    cache = LayerCache(keep=PolicyChoice("sink_recent", {"sinks": 2, "recent": 7}))
    Recipe.uniform(byte_model[0], "dense", cache=cache).save(recipe)
    arguments = ["run", str(saved), "--prompt", "Once upon a time", "--tokens", "4", "--recipe", str(recipe)]
    result = runner.invoke(app, [*arguments, "--explain"])
    assert result.exit_code == 0, result.output
    assert "tokens/s with the recipe, 0.0 MB of keys and values in PagedCache: keep sink_recent(" in result.output
    assert "keep sink_recent(sinks=2, recent=7)  8.0" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "MODEL", "--prompt", " "], "prompt=' ': expected some text"),
        (["run", "MODEL", "--prompt", "x", "--tokens", "0"], "tokens=0: expected at least 1"),
        (["run", "MODEL", "--prompt", "x", "--recipe", "none.json"], "none.json"),
        (["run", "nowhere/at-all", "--prompt", "x"], "model='nowhere/at-all': cannot be loaded"),
        (["run", "MODEL", "--prompt", "x", "--device", "warp"], "device='warp': not available here"),
        (["run", "MODEL", "--prompt", "x", "--dtype", "int4"], "dtype='int4': expected one of float32"),
        (["compare", "sink_window", "--shape", "1,2"], "shape=(1, 2): expected five sizes"),
        (["compare", "sink_window", "--shape", "a"], "shape='a': expected batch,heads,kv-heads,tokens,dim"),
        (["bench", "everything"], "what='everything': expected ops, cache, decode, training or machine"),
    ],
)
def test_bad_input_is_one_clear_error(saved, arguments, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = runner.invoke(app, [str(saved) if part == "MODEL" else part for part in arguments])
    assert result.exit_code != 0
    assert words in str(result.exception)


def test_compare_as_json(tmp_path):
    plot = tmp_path / "plot.svg"
    arguments = ["compare", "sink_window:window=32", "--shape", "1,2,2,128,8", "--rounds", "1", "--json"]
    result = runner.invoke(app, [*arguments, "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["rows"]
    assert [row["label"] for row in rows] == ["dense", "sink_window(window=32)"]
    assert plot.read_text().lstrip().startswith("<?xml")


def test_compare_on_a_models_own_tensors(saved):
    arguments = ["compare", "sink_window:window=32", "--model", str(saved), "--context", "256", "--layer", "1"]
    result = runner.invoke(app, [*arguments, "--rounds", "1", "--no-crossover"])
    assert result.exit_code == 0, result.output
    assert "layer 1 of" in result.output


def test_compare_takes_rows_of_a_room():
    arguments = ["compare", "--shape", "1,2,2,128,16", "--noncausal", "--rounds", "1", "--only", "^clear"]
    result = runner.invoke(app, [*arguments, "--room", "where", "--grid", "8,16", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["mechanism"] for row in rows] == ["clear"] * 4
    assert rows[0]["density"] < 0.1 < rows[2]["density"] < 0.5
    with pytest.raises(ValueError, match="--markdown and --only with --room"):
        runner.invoke(app, [*arguments, "sink_window"], catch_exceptions=False)


def test_the_machine_is_shown():
    result = runner.invoke(app, ["bench", "machine", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["machine"]["cores"] >= 1


def test_what_learning_to_choose_is_worth(monkeypatch):
    monkeypatch.setattr("saccade.bench.recall.HELD_OUT", 4)
    monkeypatch.setattr("saccade.bench.training.recall", partial(recall, pairs=8, batch=2))
    result = runner.invoke(app, ["bench", "training", "--quick", "--only", "^moba", "--json"])
    assert result.exit_code == 0, result.output
    (case,) = json.loads(result.output)["cases"]
    assert case["name"] == "moba"
    assert case["margin"] == case["chosen"] - case["drawn"]
    table = runner.invoke(app, ["bench", "training", "--quick", "--only", "none of them"])
    assert table.exit_code == 0, table.output
