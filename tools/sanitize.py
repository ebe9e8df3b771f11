"""Run a slice of the tests on an engine built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tools/sanitize.py [arguments of pytest]

The build goes to build/sanitize and leaves the installed one alone. Without arguments the slice is SLICE below, on
every instruction set that the machine has, with 1, 2 and 7 threads. Needs GCC and its sanitizer libraries.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitize"
SLICE = [
    "tests/kernels", "tests/ops/attend", "tests/ops/block_attend", "tests/ops/gather_attend", "tests/ops/scan",
    "tests/laws/test_laws.py", "-k", "not test_laws.py or sink_window or moba or neighborhood or lightning2",
]  # fmt: skip


def runtime(compiler: str, name: str) -> str:
    """Path of a sanitizer's shared library, by the compiler that was used."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"sanitize: {compiler} has no {name}; install GCC's sanitizer libraries")
    return path


def main(arguments: list[str]) -> int:
    """Build, then test; pytest's exit status."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    preload = [runtime(compiler, name) for name in ("libasan.so", "libubsan.so")]
    environment = {**os.environ, "SACCADE_SANITIZE": "1"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD), "--build-lib", str(BUILD / "lib")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    if not list((BUILD / "lib" / "saccade" / "kernels" / "cpu").glob("_native*.so")):
        sys.exit("sanitize: the engine was not built; see the message above")
    environment |= {
        "PYTHONPATH": str(BUILD / "lib"),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python and PyTorch keep memory until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "SACCADE_SANITIZED": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(arguments or SLICE)], cwd=ROOT, env=environment, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
