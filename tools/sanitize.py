"""Run a slice of the tests on an engine built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tools/sanitize.py [arguments of pytest]

The build goes to build/sanitize and leaves the installed one alone. Without arguments: those tests of the engines
that run the C++ one, which go through all instruction sets and 1, 2 and 7 threads themselves; then a slice of the laws
with 1, 2 and 7 threads on the best instruction set, and once on each other that the machine has. A report of a
sanitizer ends its process, which fails the run. Needs GCC and its sanitizer libraries.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitize"
ENGINES = ["tests/kernels", "tests/ops", "-k", "(cpu or native) and not compil"]
LAWS = [
    f"tests/laws/test_laws.py::test_law[{name}-{law}]"
    for name in ("sink_window", "moba", "neighborhood", "lightning2", "tidal_decode")
    for law in (
        1,
        3,
        4,
        5,
        9,
        12,
    )  # the reference, poison, causality, forms, memory left unwritten, the same bits again
]
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
    environment, summary = build(), list[str]()

    def tests(what: str, chosen: list[str], **settings: str) -> bool:
        title = " ".join([what, *(f"{name}={value}" for name, value in settings.items())])
        print("sanitize:", title, flush=True)
        options = ["-q", "-r", "fE", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal"]
        command, started = [sys.executable, "-m", "pytest", *options, *chosen], time.monotonic()
        passed = subprocess.run(command, cwd=ROOT, env=environment | settings, check=False).returncode == 0
        summary.append(f"{'passed' if passed else 'FAILED'} after {time.monotonic() - started:.0f} s: {title}")
        return passed

    if arguments:
        return int(not tests("as asked", arguments))
    listed = subprocess.run([sys.executable, "-c", SETS], env=environment, capture_output=True, text=True, check=True)
    runs = [
        (name, threads)
        for number, name in enumerate(listed.stdout.split())
        for threads in (THREADS if number == 0 else THREADS[number % 3 :][:1])
    ]
    passed = [tests("engines, on each instruction set", ENGINES)]
    passed += [
        tests("laws", LAWS, SACCADE_TEST_INSTRUCTION_SET=name, SACCADE_TEST_THREADS=str(count)) for name, count in runs
    ]
    print(*(f"sanitize: {line}" for line in summary), sep="\n")
    print(f"sanitize: {sum(passed)} of {len(passed)} runs passed")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
