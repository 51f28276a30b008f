"""Time, memory and compiler facts for the examples."""

from __future__ import annotations

import ctypes
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def call_cost(call: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Seconds of the faster of two calls, and the peak memory in MiB that one call adds (None: unknown)."""
    seconds = []

    def timed() -> None:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)

    memory = peak_memory(timed, device)
    timed()
    return min(seconds), memory


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB by which memory peaks during ``call`` above what was held before; None where the system does not tell.

    On the CPU this is Linux's high-water mark of resident memory, set back just before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if sys.platform != "linux":
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # hand freed memory back, or the call would reuse it unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # a kernel without the file, a C library without the function
        return None
    before = memory_status("VmRSS")
    call()
    return (memory_status("VmHWM") - before) / 1024


def memory_status(key: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def missing_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot generate code here, or None if it can."""
    if device.type == "cuda":
        return None if shutil.which("gcc") or shutil.which("clang") or shutil.which("cc") else "needs a C compiler"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "needs a C++ compiler"
    return None if shutil.which(compiler) else "needs a C++ compiler"


def compile_counts() -> tuple[int, int]:
    """Graphs compiled and graph breaks since dynamo was last reset."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads, {platform.machine()})"
