"""Measuring fairly: interleaved rounds, medians, and the peak memory of one call."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Machine:
    """Where a figure was measured."""

    processor: str
    cores: int
    threads: int
    memory_bytes: int
    system: str
    python: str
    torch: str
    device: str
    gemm_gflops: float

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)


def describe_machine(device: str = "cpu") -> Machine:
    """The machine this runs on, with the speed of a 1024^3 fp32 matrix product."""
    return Machine(
        processor=_processor() if device == "cpu" else torch.cuda.get_device_name(device),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        device=device,
        gemm_gflops=round(gemm_gflops(device), 1),
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gemm_gflops(device: str = "cpu", size: int = 1024) -> float:
    """Speed of an fp32 matrix product, the thermometer of a noisy machine."""
    a = torch.randn(size, size, device=device)
    seconds = interleaved({"gemm": lambda: a @ a}, rounds=5, device=device)["gemm"]
    return 2 * size**3 / min(seconds) / 1e9


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
    calls: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time the calls in turn, A B C A B C ..., starting each round one further on.

    Args:
        calls: What to time, by name.
        rounds: Counted rounds.
        warmup: Rounds before them.
        device: Device to wait for.

    Returns:
        Seconds of every counted call.
    """
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds = seconds_of(calls[name], device)
            if number >= 0:
                found[name].append(seconds)
    return found


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


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
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
