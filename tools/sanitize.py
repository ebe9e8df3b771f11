"""Run a slice of the tests on an engine built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tools/sanitize.py [arguments of pytest]

The build goes to build/sanitize and leaves the installed one alone. Without arguments: the tests of the engines, which
go through all instruction sets and 1, 2 and 7 threads themselves; then a slice of the laws with 1, 2 and 7 threads on
the best instruction set, and once on each other that the machine has. Needs GCC and its sanitizer libraries.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitize"
ENGINES = ["tests/kernels", "tests/ops", "-k", "not compil"]
MECHANISMS = "(sink_window or moba or neighborhood or lightning2) and not vmoba"
LAWS = ["tests/laws/test_laws.py", "-k", f"{MECHANISMS} and not -11 and not -14"]
THREADS = (1, 2, 7)
SETS = "from saccade.kernels import cpu; print(*(name for name in cpu.INSTRUCTION_SETS if cpu.use(name)))"


def runtime(compiler: str, name: str) -> str:
    """Path of a sanitizer's shared library, by the compiler that was used."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"sanitize: {compiler} has no {name}; install GCC's sanitizer libraries")
    return path


def build() -> dict[str, str]:
    """Build into build/sanitize; the environment in which Python uses that."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    preload = [runtime(compiler, name) for name in ("libasan.so", "libubsan.so")]
    environment = {**os.environ, "SACCADE_SANITIZE": "1"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD), "--build-lib", str(BUILD / "lib")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    if not list((BUILD / "lib" / "saccade" / "kernels" / "cpu").glob("_native*.so")):
        sys.exit("sanitize: the engine was not built; see the message above")
    return environment | {
        "PYTHONPATH": str(BUILD / "lib"),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python and PyTorch keep memory until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "SACCADE_SANITIZED": "1",
    }


def main(arguments: list[str]) -> int:
    """Build, then test; 1 if a run failed."""
    environment = build()

    def tests(chosen: list[str], **settings: str) -> bool:
        print("sanitize:", *chosen, *(f"{name}={value}" for name, value in settings.items()), flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-r", "fE", "-p", "no:cacheprovider", *chosen]
        return subprocess.run(command, cwd=ROOT, env=environment | settings, check=False).returncode == 0

    if arguments:
        return int(not tests(arguments))
    listed = subprocess.run([sys.executable, "-c", SETS], env=environment, capture_output=True, text=True, check=True)
    runs = [
        (name, threads)
        for number, name in enumerate(listed.stdout.split())
        for threads in (THREADS if number == 0 else THREADS[number % 3 :][:1])
    ]
    passed = [tests(ENGINES)]
    passed += [tests(LAWS, SACCADE_TEST_INSTRUCTION_SET=name, SACCADE_TEST_THREADS=str(count)) for name, count in runs]
    print(f"sanitize: {sum(passed)} of {len(passed)} runs passed")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
