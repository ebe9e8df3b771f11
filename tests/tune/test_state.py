"""The state file of a run."""

from __future__ import annotations

import json

import pytest

from saccade.tune.state import RunState

pytestmark = pytest.mark.quick


def test_results_survive(tmp_path):
    path = tmp_path / "deep" / "state.json"
    first = RunState(path, {"a": 1})
    assert not first.resumed
    first.put("stage", "key", [1.5, "x"])
    second = RunState(path, {"a": 1})
    assert second.resumed
    assert second.get("stage", "key") == [1.5, "x"]
    assert second.get("stage", "other") is None


def test_other_arguments_start_anew(tmp_path):
    path = tmp_path / "state.json"
    RunState(path, {"a": 1}).put("stage", "key", 1)
    assert RunState(path, {"a": 2}).get("stage", "key") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 9}', '{"version": 1, "identity": 3, "stages": []}'])
def test_a_broken_file_is_no_file(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_text(text)
    assert not RunState(path, {"a": 1}).resumed


def test_stages_of_the_wrong_form_are_ignored(tmp_path):
    path = tmp_path / "state.json"
    state = RunState(path, {})
    path.write_text(json.dumps({"version": 1, "identity": state.identity, "stages": {"scores": 3}}))
    assert not RunState(path, {}).resumed


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    state = RunState(path, {})
    state.put("stage", "key", 1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(RuntimeError, match=r"state.json: cannot be written: No space left on device"):
        state.put("stage", "other", 2)
    monkeypatch.undo()
    assert RunState(path, {}).get("stage", "key") == 1
