"""Run a slice of the tests on an engine built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tools/sanitize.py [arguments of pytest]

The build goes to build/sanitize and leaves the installed one alone. Without arguments: those tests of the engines
that run the C++ one, which go through all instruction sets and 1, 2 and 7 threads themselves; then a slice of the laws
on each instruction set that the machine has, with 1, 2 or 7 threads. A report of a sanitizer ends its process and is
printed at the end; a report fails the run, whatever the tests made of it. Needs GCC and its sanitizer libraries.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitize"
REPORTS = BUILD / "reports"
LINES = 60  # of a report, that are printed; the file has the rest
SHOWN = 5  # reports that are printed
ENGINES = ["tests/kernels", "tests/ops", "-k", "(cpu or native or engine) and not compil and not opcheck and not eager"]
LAWS = [
    f"tests/laws/test_laws.py::test_law[{name}-{law}]"
    for name in ("sink_window", "moba", "neighborhood", "lightning2", "tidal_decode")
    for law in (1, 3, 4, 9, 12)  # the reference, poison, causality, memory left unwritten, the same bits again
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
    shutil.rmtree(BUILD / "lib", ignore_errors=True)  # a module that is gone from the sources must not stay there
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD), "--build-lib", str(BUILD / "lib")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    if not list((BUILD / "lib" / "saccade" / "kernels" / "cpu").glob("_native*.so")):
        sys.exit("sanitize: the engine was not built; see the message above")
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir()
    return environment | {
        "PYTHONPATH": str(BUILD / "lib"),
        "LD_PRELOAD": " ".join(preload),
        # Files, for pytest holds back what a dying process prints. Python and PyTorch keep memory until the end.
        "ASAN_OPTIONS": f"detect_leaks=0:abort_on_error=1:log_path={REPORTS}/address",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={REPORTS}/undefined",
        "OMP_NUM_THREADS": "1",
        "SACCADE_SANITIZED": "1",
    }


def run_tests(what: str, chosen: list[str], environment: dict[str, str], settings: dict[str, str]) -> tuple[bool, str]:
    """Whether the chosen tests passed, and a line for the summary."""
    title = " ".join([what, *(f"{name}={value}" for name, value in settings.items())])
    print("sanitize:", title, flush=True)
    options = ["-q", "-r", "fE", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal"]
    command, started = [sys.executable, "-m", "pytest", *options, *chosen], time.monotonic()
    passed = subprocess.run(command, cwd=ROOT, env=environment | settings, check=False).returncode == 0
    return passed, f"{'passed' if passed else 'FAILED'} after {time.monotonic() - started:.0f} s: {title}"


def plan(environment: dict[str, str]) -> list[tuple[str, int]]:
    """Instruction set and threads of every run of the laws: all of both, each as often as it takes."""
    listed = subprocess.run([sys.executable, "-c", SETS], env=environment, capture_output=True, text=True, check=True)
    names = listed.stdout.split()
    count = max(len(names), len(THREADS))
    return [(names[number % len(names)], THREADS[number % len(THREADS)]) for number in range(count)]


def show_reports() -> int:
    """Print what the sanitizers wrote; how many reports there are."""
    reports = sorted(path for path in REPORTS.iterdir() if path.stat().st_size)
    for path in reports[:SHOWN]:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"sanitize: report {path.relative_to(ROOT)}", *lines[:LINES], sep="\n")
    return len(reports)


def main(arguments: list[str]) -> int:
    """Build, then test; 1 if a run failed or a sanitizer reported anything."""
    started, environment = time.monotonic(), build()
    built = time.monotonic() - started
    if arguments:
        results = [run_tests("as asked", arguments, environment, {})]
    else:
        results = [run_tests("engines, on each instruction set", ENGINES, environment, {})]
        for name, count in plan(environment):
            settings = {"SACCADE_TEST_INSTRUCTION_SET": name, "SACCADE_TEST_THREADS": str(count)}
            results.append(run_tests("laws", LAWS, environment, settings))
    reports, passed = show_reports(), sum(good for good, _ in results)
    print(f"sanitize: built after {built:.0f} s", *(f"sanitize: {line}" for _, line in results), sep="\n")
    print(f"sanitize: {passed} of {len(results)} runs passed, {reports} reports of the sanitizers")
    return int(passed < len(results) or reports > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
