"""Measuring fairly: interleaved rounds, medians, and the peak memory of one call."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from saccade.ops.dispatch import cpu_engine

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Machine:
    """Where a figure was measured.

    Args:
        processor: Its name.
        cores: Those that this process may use.
        threads: Those that PyTorch and the engines use.
        memory_bytes: Of the whole machine.
        system: Operating system and architecture.
        python: Version.
        torch: Version.
        device: In torch's words.
        engine: Instruction set that the C++ engine uses, or why there is none.
        gemm_gflops: Speed of a 1024^3 matrix product in fp32.
        gemm_bf16_gflops: The same in bf16.
        read_gbytes: 10^9 bytes a second when 256 MiB are summed.
    """

    processor: str
    cores: int
    threads: int
    memory_bytes: int
    system: str
    python: str
    torch: str
    device: str
    engine: str
    gemm_gflops: float
    gemm_bf16_gflops: float
    read_gbytes: float

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)


def describe_machine(device: str = "cpu") -> Machine:
    """The machine this runs on, with what it can do at most: matrix products and reading memory."""
    return Machine(
        processor=_processor() if device == "cpu" else torch.cuda.get_device_name(device),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        device=device,
        engine=cpu_engine(),
        gemm_gflops=round(gemm_gflops(device), 1),
        gemm_bf16_gflops=round(gemm_gflops(device, dtype=torch.bfloat16), 1),
        read_gbytes=round(read_gbytes(device), 1),
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gemm_gflops(device: str = "cpu", size: int = 1024, dtype: torch.dtype = torch.float32) -> float:
    """Speed of a matrix product; in fp32 the thermometer of a noisy machine."""
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = interleaved({"gemm": lambda: a @ a}, rounds=5, device=device)["gemm"]
    return 2 * size**3 / min(seconds) / 1e9


def read_gbytes(device: str = "cpu", size: int = 2**28) -> float:
    """Speed of reading memory once, 10^9 bytes a second: summing `size` bytes."""
    x = torch.ones(size // 4, device=device)
    seconds = interleaved({"read": x.sum}, rounds=5, device=device)["read"]
    return size / min(seconds) / 1e9


def synchronise(device: str) -> None:
    """Wait for the device, so that a clock means something."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of one call."""
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    warmup: int = 1,
    device: str = "cpu",
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Time the calls in turn, A B C A B C ..., starting each round one further on.

    Args:
        calls: What to time, by name.
        rounds: Counted rounds.
        warmup: Rounds before them.
        device: Device to wait for.
        before: Called, untimed, before every call.

    Returns:
        Seconds of every counted call.
    """
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            before()
            seconds = seconds_of(calls[name], device)
            if number >= 0:
                found[name].append(seconds)
    return found


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def quartiles(values: list[float]) -> tuple[float, float]:
    """The lower and the upper quartile: between them lies the middle half."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def can_measure_peak(device: str = "cpu") -> bool:
    """Whether `peak_bytes` works here: CUDA, or a Linux that lets a process reset its own high-water mark."""
    return device.startswith("cuda") or (_STATUS.exists() and os.access(_CLEAR, os.W_OK))


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """Memory that one call needs at its peak beyond what was held before it; None where it cannot be measured."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if not can_measure_peak(device):
        call()
        return None
    _return_free_memory()
    _CLEAR.write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _return_free_memory() -> None:
    """Give freed pages back, so that they do not hide an allocation."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # names of glibc's mallopt
_OWN_SETTINGS = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 * 2**20), (_TRIM_THRESHOLD, 64 * 2**20))
"""What glibc arrives at by itself once blocks of 32 MiB were freed."""


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Inside, what is freed stays with the process for its next allocations, as with an allocator that caches.

    glibc gives blocks of 32 MiB and more back to the system at once. Results that large then lie on fresh pages in
    every call, which the system must clear and, in a virtual machine, its host must find: after a call that freed
    gigabytes up to 2 ms for each MiB, which is more than the faster engines take to fill it. With another C library
    nothing changes.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    # The ends that aligning a large block cuts off are small: kept aside as such, they would leave the rest too short
    # for its next use. With the shelves for small blocks full they join it again when it is freed.
    for block in [libc.malloc(size) for size in range(24, 1040, 16) for _ in range(7)]:
        libc.free(block)
    try:
        yield
    finally:
        for name, value in _OWN_SETTINGS:
            libc.mallopt(name, value)
        _return_free_memory()
