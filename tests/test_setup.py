"""The C++ engine is optional at install time: what a missing compiler costs, and what the source archive holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "src")

pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests are away from their sources")


@pytest.fixture
def copy(tmp_path):
    """The sources without anything built."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", "_native.missing")
            shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, tmp_path / part)
    return tmp_path


def run(folder: Path, *arguments: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("inplace", [True, False])
def test_a_missing_compiler_costs_one_line(copy, inplace):
    command = ["build_ext", "--inplace"] if inplace else ["build", "--build-lib", "built"]
    printed = run(copy, "setup.py", "-q", *command, CXX="/no/such/compiler", CC="/no/such/compiler")
    lines = [line for line in printed.splitlines() if line.startswith("saccade:")]
    assert len(lines) == 1
    assert lines[0].startswith("saccade: the C++ CPU engine is skipped (")
    assert "/no/such/compiler" in lines[0]
    assert not list(copy.rglob("_native*.so"))
    home = copy / ("src" if inplace else "built")
    code = "import saccade, torch; from saccade.kernels import cpu; x = torch.ones(1, 1, 3, 2); "
    code += "print(saccade.__file__); print(cpu.missing()); print(saccade.attend(x, x, x).sum().item())"
    place, missing, total = run(copy, "-c", code, PYTHONPATH=str(home)).splitlines()
    assert Path(place).is_relative_to(home)
    assert missing.startswith("the C++ engine is not built (it takes a C++ compiler at install time): ")
    assert "/no/such/compiler" in missing
    assert total == "6.0"


def test_a_failed_rebuild_leaves_no_library_of_older_sources(copy):
    home = copy / "src" / "saccade" / "kernels" / "cpu"
    suffix = run(copy, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").strip()
    (home / f"_native{suffix}").write_bytes(b"older")
    run(copy, "setup.py", "-q", "build_ext", "--inplace", "--force", CXX="/no/such/compiler", CC="/no/such/compiler")
    assert not list(home.glob("_native*.so"))


def test_the_source_archive_holds_the_engine(copy):
    run(copy, "setup.py", "-q", "sdist", "--formats=gztar")
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        held = {Path(*Path(name).parts[1:]).as_posix() for name in files.getnames()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.cpp", "*.hpp", "*.inl")
        for path in (ROOT / "src" / "saccade" / "kernels").rglob(pattern)
    }
    assert len(sources) > 10
    assert sources | {"setup.py", "src/saccade/py.typed"} <= held
